/** Shapes of what the page's endpoints and modules exchange. Checked by tsc, never loaded by a browser. */

export interface Limits {
  reference_count: number;
  reference_bytes: number;
  pixel_count: number;
  image_count: number;
  step_count: number;
  default_size_px: number;
  adapter_count: number;
}

export interface Adapter {
  name: string;
  kind: string;
  rank: number;
  problem: string;
}

export interface Stage {
  name: string;
  target: string;
  serving: boolean;
  problem: string;
}

export interface Model {
  name: string;
  serving: boolean;
  distilled: boolean;
  default_step_count: number;
  default_guidance_scale: number;
  description: string;
  subject_words: string[];
  limits: Limits;
  adapters: Adapter[];
  stages: Stage[];
}

export interface Models {
  models: Model[];
  default_model: string;
  /** Address of the public gRPC API, for samples of code. */
  target: string;
}

/** Parameters of a request, with the names of the API. `null` is the model's default. */
export interface Settings {
  model: string;
  prompt: string;
  negative_prompt: string | null;
  width_px: number | null;
  height_px: number | null;
  step_count: number | null;
  guidance_scale: number | null;
  /** Decimal digits: seeds have 63 bits. */
  seed: string;
  image_count: number;
  format: "png" | "jpeg" | "webp";
  quality: number | null;
  adapters: { name: string; scale: number }[];
  strength: number | null;
  mask_padding_px: number | null;
}

/** Files of a request. */
export interface Inputs {
  references: Blob[];
  initial_image: Blob | null;
  mask: Blob | null;
}

export interface Violation {
  field: string;
  description: string;
}

/** An image of a stream; `data` is base64. */
export interface ImageEvent {
  index: number;
  seed: string;
  width_px: number;
  height_px: number;
  format: string;
  step: number;
  data: string;
}

export interface StageTiming {
  stage: string;
  operation: string;
  queue_seconds: number;
  compute_seconds: number;
}

export interface Summary {
  request_id: string;
  model: string;
  flow: string;
  step_count: number;
  guidance_scale: number;
  total_seconds: number;
  stage_timings: StageTiming[];
  warnings: string[];
}

export type GenerationEvent =
  | { type: "queued"; position: number; estimated_wait_seconds: number | null }
  | { type: "step"; step: number; step_count: number }
  | ({ type: "preview" } & ImageEvent)
  | ({ type: "image" } & ImageEvent)
  | ({ type: "summary" } & Summary);

/** A finished image. */
export interface Picture {
  blob: Blob;
  seed: string;
  width_px: number;
  height_px: number;
  format: string;
}

/** A finished request: everything that makes it again, and its pictures. */
export interface Entry {
  id: string;
  /** Milliseconds since 1970. */
  at: number;
  settings: Settings;
  inputs: Inputs;
  pictures: Picture[];
  summary: Summary;
}

export interface ProcessLoad {
  target: string;
  stage: string | null;
  problem: string;
  serving: boolean;
  model: string | null;
  device: string | null;
  queued: number | null;
  running: number | null;
  queue_wait_seconds: number | null;
  busy_ratio: number | null;
  requests_per_second: number | null;
  step_seconds: number | null;
  step_occupancy_ratio: number | null;
  refused_per_second: number | null;
  memory_bytes: number | null;
}

export interface CacheLoad {
  process: string;
  kind: string;
  hits: number;
  lookups: number;
  bytes: number | null;
  evictions: number;
}

/** A part of a request's life, in seconds from its arrival. */
export interface Phase {
  phase: "wait" | "encode" | "denoise" | "decode";
  start_seconds: number;
  end_seconds: number;
}

export interface RecentRequest {
  request_id: string;
  model: string;
  flow: string;
  outcome: string;
  age_seconds: number;
  total_seconds: number;
  steps: number[];
  phases: Phase[];
}

export interface SuiteState {
  models: Model[];
  models_problem: string;
  images_per_second: number | null;
  megapixels_per_second: number | null;
  in_progress: number | null;
  median_seconds: number | null;
  p95_seconds: number | null;
  cache_hit_ratio: number | null;
  processes: ProcessLoad[];
  caches: CacheLoad[];
  requests: RecentRequest[];
}
