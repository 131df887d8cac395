// The keys of lists of tokens, and the bar with the id of the token under the pointer or the focus.
(() => {
  "use strict";
  const bar = document.createElement("div");
  bar.className = "tk-bar";
  bar.hidden = true;
  // the same words are the name of the token itself: a screen reader has read them
  bar.setAttribute("aria-hidden", "true");
  const spelling = bar.appendChild(document.createElement("b"));
  const words = bar.appendChild(document.createElement("span"));

  const stops = new WeakMap();
  let selected = null;

  const tokenOf = (node) => (node instanceof Element ? node.closest(".tk") : null);

  const show = (token) => {
    bar.hidden = !token;
    if (!token) return;
    spelling.textContent = [...token.querySelectorAll(".tk-cell")].map((cell) => cell.textContent).join(" / ");
    words.textContent = token.getAttribute("aria-label");
    if (!bar.isConnected) document.body.append(bar);
  };

  const step = (token, forward) => {
    const way = forward ? "nextElementSibling" : "previousElementSibling";
    for (let next = token[way]; next; next = next[way]) if (next.matches(".tk")) return next;
    // behind the last token of a turn comes the first of the next
    const lists = [...token.closest(".tk-row").querySelectorAll(".tk-list")];
    const list = lists[lists.indexOf(token.parentElement) + (forward ? 1 : -1)];
    return list ? list.querySelector(forward ? ".tk" : ":scope > .tk:last-of-type") : null;
  };

  const lineBeside = (token, forward) => {
    const from = token.getBoundingClientRect();
    let best = null;
    let bottom = null;
    let least = Infinity;
    for (let next = step(token, forward); next; next = step(next, forward)) {
      const box = next.getBoundingClientRect();
      // the tokens of a line end at one height: one that is wrong has its mark above
      if (Math.abs(box.bottom - from.bottom) < 2) continue;
      bottom ??= box.bottom;
      if (Math.abs(box.bottom - bottom) >= 2) break;
      const distance = Math.abs(box.left + box.right - from.left - from.right);
      if (distance < least) [best, least] = [next, distance];
    }
    return best;
  };

  const differenceBeside = (token, forward) => {
    const all = [...document.querySelectorAll(".tk-list > .tk-wrong")];
    const way = forward ? Node.DOCUMENT_POSITION_FOLLOWING : Node.DOCUMENT_POSITION_PRECEDING;
    const beside = all.filter((one) => token.compareDocumentPosition(one) & way);
    return beside.at(forward ? 0 : -1);
  };

  const moves = {
    ArrowRight: (token) => step(token, true),
    ArrowLeft: (token) => step(token, false),
    ArrowDown: (token) => lineBeside(token, true),
    ArrowUp: (token) => lineBeside(token, false),
    Home: (token) => token.parentElement.querySelector(".tk"),
    End: (token) => token.parentElement.querySelector(":scope > .tk:last-of-type"),
    n: (token) => differenceBeside(token, true),
    p: (token) => differenceBeside(token, false),
  };

  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") show(null);
    const token = tokenOf(event.target);
    const move = moves[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (!token || !move || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    move(token)?.focus();
  });

  document.addEventListener("focusin", (event) => {
    const token = tokenOf(event.target);
    show(token);
    if (!token) return;
    // one token of each list is a stop of the Tab key: the one that was last in focus
    const stop = stops.get(token.parentElement) ?? token.parentElement.querySelector(".tk");
    stop.tabIndex = -1;
    token.tabIndex = 0;
    stops.set(token.parentElement, token);
    selected?.removeAttribute("aria-selected");
    token.setAttribute("aria-selected", "true");
    selected = token;
  });

  document.addEventListener("focusout", () => show(null));
  document.addEventListener("pointerover", (event) => show(tokenOf(event.target) ?? tokenOf(document.activeElement)));
  document.addEventListener("click", (event) => {
    const link = event.target instanceof Element ? event.target.closest(".tk-found a") : null;
    if (link) document.getElementById(link.hash.slice(1))?.focus();
  });
})();
