// SPDX-License-Identifier: Apache-2.0
/** The server's routes. Addresses are relative: the page also works behind a prefix of a proxy. */

const ID = /^video_[0-9a-f]{32}$/;
const PAGE = 100; // jobs in one answer

/** The server's refusal, in its own words. */
export class Refused extends Error {
  constructor(status, error) {
    super(error.message);
    this.status = status;
    this.code = error.code ?? null;
    this.param = error.param ?? null;
  }
}

/** The server gave no answer. */
export class Unreachable extends Error {}

/** Return the address of a job's route: of its file, its receipt. */
export function address(id, route = "") {
  if (!ID.test(id)) throw new Error(`not an id of this server: ${id}`);
  return `v1/videos/${id}${route}`;
}

/** Return every job, newest first. */
export async function listVideos() {
  const videos = [];
  let after = "";
  for (;;) {
    const page = await ask(`v1/videos?order=desc&limit=${PAGE}${after}`);
    videos.push(...page.data);
    if (!page.has_more || !page.last_id || page.data.length === 0) return videos;
    after = `&after=${encodeURIComponent(page.last_id)}`;
  }
}

/** Submit a job; the same key twice makes it once. */
export function createVideo(fields, key) {
  return ask("v1/videos", { method: "POST", body: fields, headers: { "Idempotency-Key": key } });
}

export const cancelVideo = (id) => ask(address(id, "/cancel"), { method: "POST" });
export const deleteVideo = (id) => ask(address(id), { method: "DELETE" });
/** Return a receipt's text: JavaScript would round its large numbers. */
export const readReceipt = (id) => ask(address(id, "/receipt"), { read: (answer) => answer.text() });
export const listPresets = async () => (await ask("v1/presets")).data;
export const listModels = async () => (await ask("v1/models")).data;
export const openSession = (token) => ask("v1/session", { method: "POST", body: { token } });

/** Return why no clip would be made now, in the server's words; "" where one would. */
export async function readTrouble() {
  try {
    await ask("ready");
    return "";
  } catch (error) {
    if (error.status === 503) return error.message;
    throw error;
  }
}

/** Return a random key for createVideo; works without a secure context, unlike randomUUID. */
export function newKey() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) =>
    byte.toString(16).padStart(2, "0"),
  ).join("");
}

/** Ask for JSON, or what `read` makes of a good answer. Throws Refused with the server's words, or Unreachable. */
async function ask(path, { method = "GET", body, headers = {}, read } = {}) {
  const patience = method === "GET" ? 10_000 : 45_000; // a running job ends at its next block
  let answer;
  try {
    answer = await fetch(path, {
      method,
      headers: body ? { ...headers, "Content-Type": "application/json" } : headers,
      body: body && JSON.stringify(body),
      cache: "no-store",
      signal: AbortSignal.timeout(patience),
    });
  } catch {
    throw new Unreachable("The server does not answer. Nothing was lost; try again in a moment.");
  }
  let content;
  try {
    content = await (answer.ok && read ? read(answer) : answer.json());
  } catch {
    content = null; // of a proxy in between, not of our server
  }
  if (answer.ok && content !== null) return content;
  throw new Refused(answer.status, content?.error ?? { message: `The server answered ${answer.status}.` });
}
