"use strict";
{
  const at = (id) => document.getElementById(id);
  const stage = at("stage"), still = document.createElement("img"), cut = at("cut");
  const videos = data.layers.map((layer) => {
    const video = document.createElement("video");
    Object.assign(video, { src: layer.src, muted: true, playsInline: true, preload: "auto" });
    stage.append(video);
    return video;
  });
  stage.style.aspectRatio = data.size.join("/");
  stage.append(still); // the frame itself, not the mp4's, while nothing moves
  const selects = [at("left"), at("right")];
  for (const select of selects) data.layers.forEach(({ name }, i) => select.add(new Option(name, i)));
  selects[1].value = Math.min(1, data.layers.length - 1);

  const chosen = () => selects.map((select) => Number(select.value));
  const clips = () => [`inset(0 ${100 - cut.value}% 0 0)`, `inset(0 0 0 ${cut.value}%)`];
  const player = new Player(at("transport"), data.count, (k, playing) => {
    const [left, right] = chosen();
    const frames = playing ? -1 : [left, right].findIndex((i) => data.layers[i].frames);
    videos.forEach((video, i) => { video.style.visibility = i === left || i === right ? "visible" : "hidden"; });
    videos[left].style.clipPath = left === right ? "none" : clips()[0];
    if (left !== right) videos[right].style.clipPath = clips()[1];
    still.style.visibility = frames < 0 ? "hidden" : "visible";
    if (frames >= 0) {
      still.style.clipPath = left === right ? "none" : clips()[frames];
      still.src = data.layers[[left, right][frames]].frames[k];
    }
    document.querySelectorAll("#moments td").forEach((cell, i) => {
      cell.classList.toggle("now", Math.round(k / data.steps) === i);
    });
  });
  const items = () => [...new Set(chosen())].map((i) => ({ video: videos[i], fps: data.layers[i].fps }));
  for (const select of selects) select.onchange = () => player.use(items());
  cut.oninput = () => player.tell();
  document.querySelectorAll("[data-anchor]").forEach((picture) => {
    picture.onclick = () => player.step(data.steps * Number(picture.dataset.anchor) - player.k);
  });
  still.onerror = () => { still.style.visibility = "hidden"; }; // frames were removed: the mp4 is there
  player.use(items());
}
