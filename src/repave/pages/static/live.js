// Keeps the page true. The server sends parts that changed and the order of rows; this puts them in place without moving what is pointed at or focused.
"use strict";
(() => {
  const SILENT_MS = 12000; // the server beats every 5 s
  const AGAIN_MS = 1000;
  const body = document.body, mark = document.getElementById("live"), stale = document.getElementById("stale");
  document.documentElement.classList.add("js");
  if (!body.dataset.live || !window.EventSource) return;

  const KEPT = { DETAILS: ["open"], INPUT: ["checked", "value"] }; // what people change themselves
  const late = new Map(); // lists whose order waits until nobody is in them
  let source = null, heard = Date.now(), paused = false, lost = false, frame = body.dataset.frame, timer = 0;

  function time(at) { return new Date(at).toISOString().slice(11, 19); }

  function tell(state, sign, words) {
    mark.dataset.state = state;
    mark.querySelector(".mark").textContent = sign;
    mark.querySelector(".words").textContent = words;
  }

  function parse(html) {
    const holder = document.createElement("template");
    const drawn = html.startsWith("<g"); // only inside an svg it is a part of a drawing
    holder.innerHTML = drawn ? `<svg>${html}</svg>` : html;
    return drawn ? holder.content.firstElementChild.firstElementChild : holder.content.firstElementChild;
  }

  // `old` becomes like `now`, changing as little as possible: focus, selection and open details stay.
  function morph(old, now) {
    if (old.nodeName !== now.nodeName) { old.replaceWith(now); return; }
    if (old.nodeType !== Node.ELEMENT_NODE) { if (old.nodeValue !== now.nodeValue) old.nodeValue = now.nodeValue; return; }
    const kept = KEPT[old.nodeName] || [], own = old.classList.contains("at");
    for (const { name, value } of [...now.attributes]) if (!kept.includes(name) && old.getAttribute(name) !== value) old.setAttribute(name, value);
    for (const { name } of [...old.attributes]) if (!kept.includes(name) && !now.hasAttribute(name)) old.removeAttribute(name);
    if (own) old.classList.add("at");
    const was = [...old.childNodes], will = [...now.childNodes];
    will.forEach((child, i) => { if (i < was.length) morph(was[i], child); else old.append(child); });
    was.slice(will.length).forEach((child) => child.remove());
  }

  function order(list, ids) {
    const held = list.matches(":hover, :focus-within") || list.querySelector(".at");
    const has = new Set([...list.children].map((row) => row.id));
    const same = list.children.length === ids.length && ids.every((id, i) => list.children[i].id === id);
    if (same) { late.delete(list.id); return; }
    const made = ids.filter((id) => !has.has(id) && waiting.has(id)).map((id) => waiting.get(id));
    if (held) { // new ones at the end, nothing else moves now
      made.forEach((row) => list.append(row));
      late.set(list.id, ids);
      return;
    }
    late.delete(list.id);
    const rows = new Map([...list.children, ...made].map((row) => [row.id, row]));
    ids.forEach((id, i) => {
      const row = rows.get(id);
      if (row && list.children[i] !== row) list.insertBefore(row, list.children[i] || null);
    });
    [...list.children].filter((row) => !ids.includes(row.id)).forEach((row) => row.remove());
  }

  const waiting = new Map(); // rows that have no place yet

  function apply(change) {
    for (const [id, html] of Object.entries(change.parts)) {
      const old = document.getElementById(id), now = parse(html);
      if (old) morph(old, now); else waiting.set(id, now);
    }
    for (const [id, ids] of Object.entries(change.lists)) {
      const list = document.getElementById(id);
      if (list) order(list, ids);
    }
    waiting.clear();
    document.dispatchEvent(new CustomEvent("repave:painted"));
  }

  function settle() {
    for (const [id, ids] of [...late]) {
      const list = document.getElementById(id);
      if (list && !list.matches(":hover, :focus-within") && !list.querySelector(".at")) order(list, ids);
    }
  }
  document.addEventListener("pointerout", () => setTimeout(settle, 50));
  document.addEventListener("focusout", () => setTimeout(settle, 50));

  function isHeard() {
    heard = Date.now();
    if (lost) { lost = false; stale.hidden = true; stale.textContent = ""; body.classList.remove("lost"); }
    tell("live", "●", "live");
  }

  function isLost() {
    if (lost || paused) return;
    lost = true;
    body.classList.add("lost");
    tell("lost", "✗", `not live since ${time(heard)}`);
    stale.textContent = `Not live since ${time(heard)} UTC, trying again. What is shown is old.`;
    stale.hidden = false;
  }

  function open() {
    close();
    const glue = body.dataset.live.includes("?") ? "&" : "?";
    source = new EventSource(`${body.dataset.live}${glue}frame=${frame}`);
    source.addEventListener("frame", (event) => { frame = event.lastEventId; isHeard(); apply(JSON.parse(event.data)); });
    source.addEventListener("beat", isHeard);
    source.onerror = () => { // the browser tries again by itself, with Last-Event-ID; but not after an answer that is no stream
      isLost();
      if (source.readyState === EventSource.CLOSED) { close(); timer = setTimeout(open, AGAIN_MS); }
    };
  }

  function close() {
    clearTimeout(timer);
    if (source) source.close();
    source = null;
  }

  setInterval(() => { if (source && !paused && Date.now() - heard > SILENT_MS) { isLost(); open(); } }, 1000);

  window.repave = {
    pause() {
      paused = !paused;
      if (paused) { close(); tell("still", "‖", `paused at ${time(Date.now())}`); } else { open(); }
      return paused;
    },
  };
  document.addEventListener("visibilitychange", () => { // a browser has six connections for all of a site's pages: those nobody looks at need none
    if (paused) return;
    if (document.hidden) { close(); tell("still", "○", `as of ${time(heard)} UTC`); } else { open(); }
  });
  addEventListener("pagehide", close);
  addEventListener("pageshow", (event) => { if (event.persisted) open(); });
  open();
})();
