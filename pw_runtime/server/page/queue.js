// SPDX-License-Identifier: Apache-2.0
/** All jobs on the page: in progress first, in the order of the queue; then the finished, newest first. */

import { arrange, copy, setText } from "./dom.js";
import { JobView } from "./job_view.js";
import * as words from "./words.js";

const SHOWN = 60; // groups in a section before one asks for more

/** The jobs by id, and their views. Jobs that were asked for together stand in one group. */
export class Queue {
  #videos = new Map(); // by id, newest first
  #views = new Map();
  #groups = new Map();
  #limits = { active: SHOWN, ended: SHOWN };
  #page;
  #loaded = false;

  constructor(page) {
    this.#page = page;
    for (const name of ["active", "ended"]) {
      section(name).querySelector(".more").addEventListener("click", () => {
        this.#limits[name] += SHOWN;
        this.#show();
      });
    }
  }

  /** Take a listing, newest first; jobs in `fresh` are known better than the listing knows them. */
  all(videos, fresh) {
    const known = this.#videos;
    const listed = videos.filter((video) => !fresh.has(video.id));
    const kept = [...known.values()].filter((video) => fresh.has(video.id));
    for (const video of listed) this.#say(video);
    this.#videos = new Map([...kept, ...listed].map((video) => [video.id, video]));
    if (kept.length) this.#sort(videos);
    this.#loaded = true;
    this.#show();
  }

  /** Take one job's newer state. */
  one(video) {
    this.#say(video);
    const before = this.#videos.get(video.id);
    if (before?.status === "queued" && video.status !== "queued") this.#page.queueMoved();
    if (this.#videos.has(video.id)) this.#videos.set(video.id, video);
    else this.#videos = new Map([[video.id, video], ...this.#videos]);
    this.#show();
  }

  /** Forget a job that was deleted; the focus goes to the list if it was on the job. */
  gone(id) {
    if (this.#videos.get(id)?.status === "queued") this.#page.queueMoved();
    const held = this.#views.get(id)?.element.contains(document.activeElement);
    this.#videos.delete(id);
    this.#show();
    if (held) document.getElementById("clips").focus();
  }

  /** Show every view again: what is known beside the jobs has changed. */
  refresh() {
    for (const [id, view] of this.#views) view.update(this.#videos.get(id));
  }

  /** Bring a job into view. */
  reveal(id) {
    this.#views.get(id)?.element.scrollIntoView({ block: "nearest" });
  }

  #sort(order) {
    const places = new Map(order.map((video, index) => [video.id, index]));
    const place = ([id]) => places.get(id) ?? -1; // newer than the listing
    this.#videos = new Map([...this.#videos].sort((a, b) => place(a) - place(b)));
  }

  #say(video) {
    const before = this.#videos.get(video.id);
    const said = before ? words.spokenChange(before, video) : "";
    if (said) this.#page.announce(`${words.shortened(video.prompt, 40)}: ${said}`);
  }

  #show() {
    const groups = grouped([...this.#videos.values()]);
    const active = groups.filter((group) => group.some(words.isActive)).sort(byQueue);
    const ended = groups.filter((group) => !group.some(words.isActive));
    this.#fill("ended", ended); // first: a card that moves there is never taken out in between
    this.#fill("active", active);
    for (const [id, view] of this.#views) {
      if (this.#videos.has(id)) continue;
      view.film.close();
      this.#views.delete(id);
    }
    for (const [key, { root }] of this.#groups) if (!root.isConnected) this.#groups.delete(key);
    document.getElementById("waiting").hidden = this.#loaded;
    document.getElementById("empty").hidden = !this.#loaded || this.#videos.size > 0;
    this.#page.counted([...this.#videos.values()].find((video) => video.status === "in_progress"));
  }

  #fill(name, groups) {
    const node = section(name);
    const shown = groups.slice(0, this.#limits[name]);
    const hidden = groups.length - shown.length;
    node.hidden = groups.length === 0;
    arrange(node.querySelector(".groups"), shown.map((group) => this.#group(group)));
    const more = node.querySelector(".more");
    more.hidden = hidden === 0;
    setText(more, `Show ${Math.min(hidden, SHOWN)} more of ${hidden}`);
  }

  #group(videos) {
    const key = keyOf(videos[0]);
    if (!this.#groups.has(key)) this.#groups.set(key, copy("group"));
    const { root, parts } = this.#groups.get(key);
    const many = videos.length > 1;
    root.classList.toggle("gallery", many);
    parts.header.hidden = !many;
    setText(parts.prompt, videos[0].prompt);
    const drafts = videos.every((video) => video.draft_only) ? "drafts" : "clips";
    setText(parts.facts, `${videos.length} ${drafts} · ${words.presetFacts(videos[0])}`);
    arrange(parts.jobs, videos.map((video) => this.#view(video, many)));
    return root;
  }

  #view(video, inGallery) {
    let view = this.#views.get(video.id);
    if (!view) this.#views.set(video.id, (view = new JobView(this.#page)));
    if (view.video !== video || view.inGallery !== inGallery) view.update(video, inGallery);
    return view.element;
  }
}

function section(name) {
  return document.getElementById(name);
}

function keyOf(video) {
  return [video.id, ...(video.siblings ?? [])].sort()[0];
}

/** Return the jobs in groups of siblings, oldest first within a group. */
function grouped(videos) {
  const groups = new Map();
  for (const video of videos) {
    const key = keyOf(video);
    if (!groups.has(key)) groups.set(key, []);
    groups.get(key).unshift(video);
  }
  return [...groups.values()];
}

function byQueue(one, other) {
  return turn(one) - turn(other);
}

/** Return a group's turn: -1 while one of it runs, else the first one's place in the queue. */
function turn(group) {
  const places = group.filter(words.isActive).map((video) =>
    video.status === "in_progress" ? -1 : (video.queue_position ?? Infinity),
  );
  return Math.min(...places);
}
