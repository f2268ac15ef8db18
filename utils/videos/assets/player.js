"use strict";
const data = JSON.parse(document.getElementById("data").textContent);

// Shows several videos of one path at the same moment, and plays them together.
class Player {
  // count: frames of the path. onMoment(k, playing) is called whenever another frame is shown.
  constructor(bar, count, onMoment) {
    Object.assign(this, { count, onMoment, k: 0, playing: false, items: [] });
    const button = (text, title, act) => {
      const made = document.createElement("button");
      made.textContent = text;
      made.title = title;
      made.onclick = act;
      bar.append(made);
      return made;
    };
    button("|◀", "first frame", () => this.step(-count));
    button("◀", "one frame back: left arrow", () => this.step(-1));
    this.toggle = button("play", "space", () => (this.playing ? this.pause() : this.play()));
    button("▶", "one frame on: right arrow", () => this.step(1));
    button("▶|", "last frame", () => this.step(count));
    this.line = document.createElement("input");
    Object.assign(this.line, { type: "range", min: 0, max: count - 1, value: 0, ariaLabel: "frame" });
    this.line.oninput = () => { this.pause(); this.show(Number(this.line.value)); };
    this.told = document.createElement("output");
    bar.append(this.line, this.told);
    document.addEventListener("keydown", (event) => {
      if (/^(INPUT|SELECT|BUTTON)$/.test(event.target.tagName) && event.key === " ") return;
      const act = { ArrowLeft: () => this.step(-1), ArrowRight: () => this.step(1), " ": () => this.toggle.click() }[event.key];
      if (act && event.target.tagName !== "SELECT") { event.preventDefault(); act(); }
    });
  }

  // items: [{video, fps}]; the first one keeps the time.
  use(items) {
    this.pause();
    this.items = items;
    this.show(this.k);
  }

  // Show frame k of all videos; its middle, so that rounding cannot show a neighbour.
  show(k) {
    this.k = Math.max(0, Math.min(this.count - 1, k));
    for (const { video, fps } of this.items) {
      const seek = () => { video.currentTime = (this.k + 0.5) / fps; };
      video.onloadedmetadata = seek;
      if (video.readyState > 0) seek();
    }
    this.tell();
  }

  step(by) { this.pause(); this.show(this.k + by); }

  play() {
    if (this.playing || !this.items.length) return;
    if (this.k === this.count - 1) this.show(0);
    this.playing = true;
    const [first] = this.items;
    for (const { video, fps } of this.items) {
      video.playbackRate = first.fps / fps;
      video.play().catch(() => this.pause());
    }
    this.tell();
    requestAnimationFrame(() => this.follow());
  }

  pause() {
    if (!this.playing) return;
    this.playing = false;
    for (const { video } of this.items) video.pause();
    this.show(this.k);
  }

  // While playing: read the moment from the first video, and bring the others to it.
  follow() {
    if (!this.playing) return;
    const [first, ...others] = this.items;
    this.k = Math.min(this.count - 1, Math.floor(first.video.currentTime * first.fps));
    for (const { video, fps } of others) {
      const wanted = (first.video.currentTime * first.fps) / fps;
      if (Math.abs(video.currentTime - wanted) > 1.5 / fps) video.currentTime = wanted;
    }
    if (first.video.ended || this.k === this.count - 1) return this.pause();
    this.tell();
    requestAnimationFrame(() => this.follow());
  }

  tell() {
    this.line.value = this.k;
    this.told.textContent = `frame ${this.k + 1} of ${this.count}`;
    this.toggle.textContent = this.playing ? "pause" : "play";
    this.onMoment(this.k, this.playing);
  }
}

// A video element of an mp4 that is part of the page, in base64.
function embedded(mp4) {
  const bytes = Uint8Array.from(atob(mp4), (letter) => letter.charCodeAt(0));
  const video = document.createElement("video");
  Object.assign(video, { muted: true, playsInline: true, preload: "auto" });
  video.src = URL.createObjectURL(new Blob([bytes], { type: "video/mp4" }));
  return video;
}
