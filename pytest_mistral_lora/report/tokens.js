// The bar with the id of the token under the pointer or the focus, and the arrow keys, without which no token but the
// first of a turn could have the focus.
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

  document.addEventListener("keydown", (event) => {
    const token = tokenOf(event.target);
    const isArrow = event.key === "ArrowRight" || event.key === "ArrowLeft";
    if (!token || !isArrow || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    step(token, event.key === "ArrowRight")?.focus();
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
