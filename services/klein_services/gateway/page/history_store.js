/** Finished requests in IndexedDB, or in memory where the browser offers none. Bounded by number and bytes. */

/** @import { Entry } from "./types.d.ts" */

const NAME = "klein-history";
const STORE = "entries";
export const MOST_ENTRIES = 60;
export const MOST_BYTES = 96 * 1024 * 1024;

/**
 * Returns the bytes of an entry's files.
 * @param {Entry} entry
 */
export function bytesOf(entry) {
  const { references, initial_image, mask } = entry.inputs;
  const blobs = [...entry.pictures.map(({ blob }) => blob), ...references, initial_image, mask];
  return blobs.reduce((total, blob) => total + (blob?.size ?? 0), 0);
}

/** Entries, newest first. */
export class HistoryStore {
  /** @param {IDBDatabase | null} database */
  constructor(database) {
    this.database = database;
    /** @type {Entry[]} */
    this.entries = [];
  }

  /** Opens the store with what it holds from earlier visits. */
  static async open() {
    const database = await openDatabase();
    const store = new HistoryStore(database);
    if (database) {
      try {
        store.entries = await settled(database.transaction(STORE).objectStore(STORE).getAll());
      } catch {
        // Entries that cannot be read any more are of no use; the history begins anew.
        store.database = null;
      }
    }
    store.entries.sort((one, other) => other.at - one.at);
    return store;
  }

  /** Whether entries outlive the page. */
  get isKept() {
    return this.database !== null;
  }

  /**
   * Adds an entry and removes the oldest ones beyond the limits.
   * @param {Entry} entry
   * @returns {Promise<Entry[]>} what was removed
   */
  async add(entry) {
    this.entries.unshift(entry);
    let bytes = 0;
    const tooOld = this.entries.filter((each, index) => {
      bytes += bytesOf(each);
      return index > 0 && (index >= MOST_ENTRIES || bytes > MOST_BYTES);
    });
    this.entries = this.entries.filter((each) => !tooOld.includes(each));
    await this.write((store) => {
      store.put(entry);
      for (const each of tooOld) store.delete(each.id);
    });
    return tooOld;
  }

  /** @param {Entry} entry */
  async remove(entry) {
    this.entries = this.entries.filter((each) => each !== entry);
    await this.write((store) => store.delete(entry.id));
  }

  async clear() {
    this.entries = [];
    await this.write((store) => store.clear());
  }

  /**
   * Changes the database. When it refuses, for lack of space or because it was removed, entries stay in memory.
   * @param {(store: IDBObjectStore) => void} change
   */
  async write(change) {
    if (!this.database) return;
    try {
      const transaction = this.database.transaction(STORE, "readwrite");
      const done = new Promise((resolve, reject) => {
        transaction.oncomplete = resolve;
        transaction.onabort = () => reject(transaction.error);
      });
      change(transaction.objectStore(STORE));
      await done;
    } catch {
      this.database = null;
    }
  }
}

/** @returns {Promise<IDBDatabase | null>} */
async function openDatabase() {
  try {
    const request = indexedDB.open(NAME, 1);
    request.onupgradeneeded = () => request.result.createObjectStore(STORE, { keyPath: "id" });
    return await settled(request);
  } catch {
    // Private windows of some browsers have no IndexedDB.
    return null;
  }
}

/**
 * @template T
 * @param {IDBRequest<T>} request
 * @returns {Promise<T>}
 */
function settled(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}
