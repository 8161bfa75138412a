// Makes an image, or edits one: node client.mjs PROMPT FILE.png [REFERENCE.png]
// KLEIN_TARGET is the suite, by default the one on this machine; KLEIN_TOKEN is sent when it is set.
import { randomUUID } from "node:crypto";
import { readFileSync, writeFileSync } from "node:fs";
import { fileURLToPath } from "node:url";
import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";

const protos = process.env.KLEIN_PROTOS ?? fileURLToPath(new URL("../../../protos", import.meta.url));
const definition = protoLoader.loadSync("klein_api/v1/image_service.proto", {
  includeDirs: [protos],
  keepCase: true, // field names as in the .proto files: width_px, not widthPx
  longs: String, // seeds have 63 bits, a Number 53
  enums: String,
  defaults: true, // 0 and "" arrive as such, not as undefined
});
const { ImageService } = grpc.loadPackageDefinition(definition).klein_api.v1;

const [prompt, file, reference] = process.argv.slice(2);
if (!file) {
  console.error("node client.mjs PROMPT FILE.png [REFERENCE.png]");
  process.exit(2);
}

const client = new ImageService(process.env.KLEIN_TARGET ?? "127.0.0.1:50050", grpc.credentials.createInsecure(), {
  "grpc.max_receive_message_length": 256 << 20, // gRPC's default of 4 MiB is too small for images
  "grpc.max_send_message_length": 256 << 20,
  "grpc.service_config": readFileSync(`${protos}/klein_api/v1/service_config.json`, "utf8"), // retries
});
const metadata = new grpc.Metadata();
metadata.set("idempotency-key", randomUUID()); // attempts with one key are carried out once
if (process.env.KLEIN_TOKEN) metadata.set("authorization", `Bearer ${process.env.KLEIN_TOKEN}`);

const spec = { prompt, references: reference ? [readFileSync(reference)] : [] };
const call = client.StreamGenerateImage({ spec }, metadata, { deadline: Date.now() + 60_000 });
process.once("SIGINT", () => call.cancel());
try {
  for await (const { queued, step, image, summary } of call) {
    if (queued) console.log(`queued behind ${queued.position}`);
    if (step) console.log(`step ${step.step} of ${step.step_count}`);
    if (image) writeFileSync(file, image.data);
    if (summary) console.log(`${file}: ${summary.model}, ${summary.flow}`, ...summary.warnings);
  }
} catch (error) {
  if (!(error.code in grpc.status)) throw error;
  // error.details names the fields that a server refuses; google.rpc details are in grpc-status-details-bin.
  console.error(`${grpc.status[error.code]}: ${error.details}`);
  process.exitCode = 1;
} finally {
  client.close();
}
