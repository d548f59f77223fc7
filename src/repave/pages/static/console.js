// Appends what a console says; follows only where the reader is at its end.
"use strict";
(() => {
  const view = document.getElementById("console"), state = document.getElementById("console-state");
  view.scrollTop = view.scrollHeight;
  if (!view.dataset.stream || !window.EventSource) return;
  const source = new EventSource(view.dataset.stream);
  const tell = (words) => { if (state.textContent !== words) state.textContent = words; };
  source.addEventListener("console", (event) => {
    const follows = view.scrollHeight - view.scrollTop - view.clientHeight < 24;
    view.append(JSON.parse(event.data).text);
    if (follows) view.scrollTop = view.scrollHeight;
    tell("live");
  });
  source.addEventListener("over", () => { source.close(); tell("it has ended"); });
  source.onopen = () => tell("live");
  source.onerror = () => tell("not live, trying again");
})();
