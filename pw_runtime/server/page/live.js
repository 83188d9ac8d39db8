// SPDX-License-Identifier: Apache-2.0
/** Keep a view of all jobs: one listing, then events; a listing every few seconds without them. */

import { listVideos, Refused } from "./api.js";

const POLL = 3_000; // between listings while there are no events
const SOON = 300;
const RESYNC = 30_000; // between listings beside events: a connection may have died unnoticed
const HIDDEN = 10_000; // between listings of a tab that nobody sees
const RETRIES = [500, 1_000, 2_000, 4_000, 8_000]; // after a loss, the last one for ever

const FIRST = 5_000; // for the first event of a stream: the server sends one at once
const SILENT = 40_000; // without any event: the server sends one every 15 seconds
const HOPELESS = 3; // event streams that fail in a row, while listings work, before one says so

/**
 * Calls back with what the server says: all(videos, fresh) after a listing, newest first, where
 * `fresh` has the ids with an event since it was asked for; one(video) after an event; gone(id) after
 * a deletion; state("live" | "polling" | "lost" | "locked").
 */
export class Live {
  #callbacks;
  #source = null;
  #heard = false; // an event of this source
  #silence = 0; // timer: after it, something holds the events back
  #timer = 0;
  #round = 0; // of the newest listing: answers of earlier ones are dropped
  #fresh = new Set();
  #failedListings = 0;
  #failedEvents = 0;
  #listenAgain = 0; // not before this moment

  constructor(callbacks) {
    this.#callbacks = callbacks;
    addEventListener("online", () => this.refresh());
    document.addEventListener("visibilitychange", () => {
      if (document.hidden) this.#unlisten();
      this.refresh();
    });
  }

  /** List all jobs now; open the events if they are not. */
  async refresh() {
    const round = ++this.#round;
    clearTimeout(this.#timer);
    this.#listen();
    const fresh = (this.#fresh = new Set());
    try {
      const videos = await listVideos();
      if (round === this.#round) this.#show(videos, fresh);
    } catch (error) {
      if (round === this.#round) this.#lose(error);
    }
  }

  /** List all jobs in a moment: something has changed that no event told, as places in the queue. */
  refreshSoon() {
    this.#later(SOON);
  }

  #later(wait) {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.refresh(), wait);
  }

  #show(videos, fresh) {
    this.#failedListings = 0;
    this.#callbacks.all(videos, fresh);
    this.#callbacks.state(this.#failedEvents < HOPELESS ? "live" : "polling");
    const soon = !this.#source && this.#failedEvents < HOPELESS;
    const wait = soon ? pause(this.#failedEvents) : POLL;
    this.#later(document.hidden ? HIDDEN : this.#heard ? RESYNC : wait);
  }

  #lose(error) {
    this.#unlisten();
    if (error instanceof Refused && error.status === 401) {
      this.#callbacks.state("locked"); // nobody asks again before there is a token
      return;
    }
    this.#callbacks.state("lost");
    this.#later(pause(this.#failedListings++));
  }

  #unlisten() {
    clearTimeout(this.#silence);
    this.#source?.close();
    this.#source = null;
    this.#heard = false;
  }

  #fail(source) {
    source.close(); // the browser's own retries say nothing about why
    if (source !== this.#source) return;
    this.#unlisten();
    this.#listenAgain = performance.now() + pause(this.#failedEvents++);
    this.refresh();
  }

  #hear(source) {
    if (source !== this.#source) return;
    this.#expect(source, SILENT);
    if (this.#heard) return;
    this.#heard = true;
    this.#failedEvents = 0;
    this.refresh(); // what changed between the last listing and now
  }

  #expect(source, wait) {
    clearTimeout(this.#silence);
    this.#silence = setTimeout(() => this.#fail(source), wait);
  }

  /** A browser has six connections to a server, for all tabs: one that nobody sees takes none. */
  #listen() {
    if (this.#source || document.hidden || performance.now() < this.#listenAgain) return;
    const source = new EventSource("v1/events?pings=true");
    this.#source = source;
    this.#expect(source, FIRST);
    source.addEventListener("ping", () => this.#hear(source));
    source.addEventListener("video", (event) => {
      this.#hear(source);
      const video = JSON.parse(event.data);
      this.#fresh.add(video.id);
      this.#callbacks.one(video);
    });
    source.addEventListener("deleted", (event) => {
      this.#hear(source);
      const { id } = JSON.parse(event.data);
      this.#fresh.add(id);
      this.#callbacks.gone(id);
    });
    source.addEventListener("error", () => this.#fail(source));
  }
}

function pause(failures) {
  return RETRIES[Math.min(failures, RETRIES.length - 1)];
}
