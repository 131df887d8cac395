// A search field above the tables of a page that asks for one: `<div class="filter" data-of="rules"></div>`.
// It hides the rows that lack one of the typed words, and then the tables and headings that have no row left.
"use strict";

function addFilter(place) {
  const page = place.closest("article") || document;
  const tables = [...page.querySelectorAll("table")];
  const rows = tables.flatMap((table) => [...table.querySelectorAll("tbody tr")]);
  const words = new Map(rows.map((row) => [row, row.textContent.toLowerCase()]));

  const label = document.createElement("label");
  label.textContent = `Find among ${rows.length} ${place.dataset.of}: `;
  const field = document.createElement("input");
  field.type = "search";
  field.autocomplete = "off";
  label.append(field);
  const shown = document.createElement("p");
  shown.setAttribute("role", "status");
  place.append(label, shown);

  function apply() {
    const wanted = field.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const row of rows) {
      row.hidden = !wanted.every((word) => words.get(row).includes(word));
      count += row.hidden ? 0 : 1;
    }
    for (const table of tables) {
      const isEmpty = wanted.length > 0 && ![...table.querySelectorAll("tbody tr")].some((row) => !row.hidden);
      const box = table.closest(".md-typeset__scrollwrap") || table;
      box.hidden = isEmpty;
      for (let before = box.previousElementSibling; before; before = before.previousElementSibling) {
        if (/^H[1-6]$/.test(before.tagName)) {
          before.hidden = isEmpty;
          break;
        }
        if (before.tagName !== "P") break;
      }
    }
    shown.textContent = wanted.length ? `${count} of ${rows.length} ${place.dataset.of}` : "";
    history.replaceState(null, "", wanted.length ? `?find=${encodeURIComponent(field.value)}` : location.pathname);
  }

  field.addEventListener("input", apply);
  field.value = new URLSearchParams(location.search).get("find") || "";
  if (field.value) apply();
}

document.querySelectorAll(".filter").forEach(addFilter);

// A table that is wider than the page is scrolled by the keyboard, too. The theme puts its box around a table late.
function letScroll() {
  document.querySelectorAll(".md-typeset__scrollwrap:not([tabindex])").forEach((box) => {
    box.tabIndex = 0;
  });
}

new MutationObserver(letScroll).observe(document.body, { childList: true, subtree: true });
letScroll();
