// Single keys and the copy buttons. No key erases, cancels or starts anything.
"use strict";
(() => {
  const dialog = document.getElementById("keys"), on = document.getElementById("keys-on");
  const STORED = "repave-keys";
  on.checked = localStorage.getItem(STORED) !== "off";
  on.addEventListener("change", () => localStorage.setItem(STORED, on.checked ? "on" : "off"));

  document.addEventListener("click", async (event) => {
    const button = event.target.closest("[data-copy]");
    if (button) await copy(button);
  });

  async function copy(button) {
    const text = button.parentElement.querySelector("code").textContent;
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "copied";
    } catch {
      getSelection().selectAllChildren(button.parentElement.querySelector("code"));
      button.textContent = "selected";
    }
    setTimeout(() => { button.textContent = "copy"; }, 1500);
  }

  const rows = () => [...document.querySelectorAll("main [data-row]")].filter((row) => row.offsetParent !== null);

  function stand(row) {
    document.querySelectorAll(".at").forEach((other) => other.classList.remove("at"));
    if (!row) return;
    row.classList.add("at");
    const target = row.querySelector("a, input, summary") || row;
    target.focus({ preventScroll: true });
    row.scrollIntoView({ block: "nearest" });
  }

  function move(by, wanted = () => true) {
    const all = rows().filter(wanted);
    const here = all.findIndex((row) => row.classList.contains("at") || row.contains(document.activeElement));
    stand(all[here < 0 ? (by > 0 ? 0 : all.length - 1) : (here + by + all.length) % all.length]);
  }

  const here = () => document.querySelector(".at") || document.activeElement.closest("[data-row]");
  const click = (element) => element && element.click();
  const GO = { f: "/", b: "/b", i: "/i", e: "/events" };
  let going = false;
  const KEYS = {
    "/": () => document.getElementById("search").focus(),
    "?": () => dialog.showModal(),
    j: () => move(1),
    k: () => move(-1),
    f: () => move(1, (row) => row.dataset.failed === "1"),
    x: () => click(here()?.querySelector("input[type=checkbox]")),
    s: () => document.getElementById("nodeset")?.focus(),
    u: () => click(document.getElementById("fold")),
    p: () => window.repave?.pause(),
    c: () => click(document.querySelector("main [data-copy]")),
  };

  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") { document.activeElement.blur(); stand(null); return; }
    if (event.ctrlKey || event.metaKey || event.altKey || dialog.open) return;
    if (event.target.matches("input:not([type=checkbox]), textarea, select")) return;
    if (!on.checked && event.key !== "?") return;
    if (going) { going = false; if (GO[event.key]) { event.preventDefault(); location.assign(GO[event.key]); } return; }
    if (event.key === "g") { going = true; setTimeout(() => { going = false; }, 1500); return; }
    if (KEYS[event.key]) { event.preventDefault(); KEYS[event.key](); }
  });
  document.addEventListener("pointerdown", () => stand(null));
})();
