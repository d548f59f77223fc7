// The fleet's selection: boxes and the nodeset are one. The nodeset is folded by the server, so both ways give what the command line would.
"use strict";
(() => {
  const field = document.getElementById("nodeset"), form = document.getElementById("choose");
  if (!field) return;
  const number = document.getElementById("chosen"), command = document.getElementById("command");
  const image = form.elements.image;
  let last = null;

  const boxes = () => [...form.querySelectorAll("input[name=tick]")];
  const chosen = () => boxes().filter((box) => box.checked).map((box) => box.value);

  let asked = 0; // quick ticks ask side by side; only the newest question's answer counts, in whatever order they come
  async function ask(query) { // null: not a nodeset; undefined: something newer was asked meanwhile
    const mine = ++asked;
    if (!query) return { nodeset: "", names: [] };
    const answer = await fetch(`/fold?${new URLSearchParams(query)}`);
    const folded = answer.ok ? await answer.json() : null;
    return mine === asked ? folded : undefined;
  }

  function tell(nodeset, count) {
    number.textContent = count ? String(count) : "";
    command.textContent = `repave reinstall ${nodeset ? `'${nodeset}'` : "NODESET"}${image.value ? ` --image '${image.value}'` : ""} --plan-only${command.dataset.project ? ` --project ${command.dataset.project}` : ""}`;
    const address = new URL(location);
    if (nodeset) address.searchParams.set("sel", nodeset); else address.searchParams.delete("sel");
    history.replaceState(null, "", address);
  }

  async function ticked() {
    const names = chosen();
    const folded = await ask(names.length ? { names: names.join(",") } : null);
    if (!folded) return;
    field.value = folded.nodeset;
    tell(folded.nodeset, names.length);
  }

  async function typed() {
    const unfolded = await ask(field.value.trim() ? { nodeset: field.value.trim() } : null);
    if (unfolded === undefined) return;
    field.setAttribute("aria-invalid", unfolded ? "false" : "true");
    if (!unfolded) { number.textContent = "?"; return; }
    const wanted = new Set(unfolded.names);
    boxes().forEach((box) => { box.checked = wanted.has(box.value); });
    tell(unfolded.nodeset, unfolded.names.length);
  }

  form.addEventListener("click", (event) => { // shift: all between
    const box = event.target.closest("input[name=tick]");
    if (!box) return;
    const all = boxes();
    if (event.shiftKey && last) {
      const [from, to] = [all.indexOf(last), all.indexOf(box)].sort((a, b) => a - b);
      all.slice(from, to + 1).forEach((other) => { other.checked = box.checked; });
    }
    last = box;
    ticked();
  });

  let painting = null; // drag over boxes: each gets what the first one got
  form.addEventListener("pointerdown", (event) => {
    const label = event.target.closest(".tile label");
    painting = label && event.pointerType === "mouse" ? { value: !label.querySelector("input").checked, moved: false } : null;
  });
  form.addEventListener("pointerover", (event) => {
    if (!painting || !(event.buttons & 1)) return;
    const tile = event.target.closest(".tile");
    if (!tile) return;
    painting.moved = true;
    tile.querySelector("input").checked = painting.value;
  });
  addEventListener("pointerup", () => { if (painting?.moved) ticked(); painting = null; });

  field.addEventListener("input", typed);
  image.addEventListener("change", typed);
  form.addEventListener("submit", () => boxes().forEach((box) => { box.disabled = true; })); // the nodeset says it
  addEventListener("pageshow", () => boxes().forEach((box) => { box.disabled = false; }));
  typed();
})();
