"use strict";
{
  const at = (id) => document.getElementById(id);
  const shuffled = (list) => {
    for (let i = list.length - 1; i > 0; i--) {
      const j = Math.floor(Math.random() * (i + 1));
      [list[i], list[j]] = [list[j], list[i]];
    }
    return list;
  };
  const pairs = data.videos.flatMap((a, i) => data.videos.slice(i + 1).map((b) => shuffled([a, b])));
  const trials = shuffled(pairs), votes = [];
  const player = new Player(at("transport"), data.count, () => {});
  let begun;

  const next = () => {
    if (votes.length === trials.length) return finish();
    at("progress").textContent = `${votes.length + 1} of ${trials.length}`;
    const items = trials[votes.length].map(({ mp4, fps }) => ({ video: embedded(mp4), fps }));
    at("videos").replaceChildren(...items.map(({ video }) => video));
    player.k = 0;
    player.use(items);
    begun = performance.now();
  };
  const finish = () => {
    player.use([]);
    at("trial").hidden = true;
    at("end").hidden = false;
    const result = { question: data.question, finished: new Date().toISOString(), votes };
    at("votes").href = URL.createObjectURL(new Blob([JSON.stringify(result, null, 2)], { type: "application/json" }));
  };
  document.querySelectorAll("[data-choice]").forEach((button) => {
    button.onclick = () => {
      const [left, right] = trials[votes.length];
      const seconds = Math.round((performance.now() - begun) / 100) / 10;
      votes.push({ left: left.id, right: right.id, choice: button.dataset.choice, seconds });
      next();
    };
  });
  next();
}
