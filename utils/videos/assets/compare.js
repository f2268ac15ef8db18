"use strict";
{
  const side = document.getElementById("videos");
  const items = data.videos.map(({ name, fps, mp4 }) => {
    const video = embedded(mp4), figure = document.createElement("figure"), caption = document.createElement("figcaption");
    caption.textContent = name;
    figure.append(video, caption);
    side.append(figure);
    return { video, fps };
  });
  new Player(document.getElementById("transport"), data.count, () => {}).use(items);
}
