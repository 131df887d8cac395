// Search and filters over findings and checks, and buttons that copy commands. Without it the page shows everything.
(() => {
  "use strict";
  const form = document.getElementById("filters");
  const status = document.getElementById("shown");
  const items = [...document.querySelectorAll("[data-outcome]")];
  const texts = new Map(items.map((item) => [item, item.textContent.toLowerCase()]));
  const parts = [...document.querySelectorAll("details[data-checks]")].map((part) => [part, part.open]);
  const fields = ["rule", "outcome", "target"];

  const apply = () => {
    const words = form.elements.search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const chosen = fields.map((name) => [name, form.elements[name].value]).filter(([, value]) => value);
    const counts = { cause: [0, 0], check: [0, 0] };
    for (const item of items) {
      const fits = chosen.every(([name, value]) => item.dataset[name].split(" ").includes(value));
      item.hidden = !fits || !words.every((word) => texts.get(item).includes(word));
      const count = counts[item.classList.contains("cause") ? "cause" : "check"];
      count[0] += !item.hidden;
      count[1] += 1;
    }
    for (const [part, wasOpen] of parts) {
      const shown = part.querySelectorAll("[data-outcome]:not([hidden])").length;
      part.hidden = !shown;
      part.open = words.length > 0 || chosen.length > 0 ? shown > 0 : wasOpen;
    }
    status.textContent = `${counts.cause.join(" of ")} findings and ${counts.check.join(" of ")} checks are shown`;
  };

  form.hidden = false;
  form.addEventListener("input", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(apply));
  apply();

  const copy = async (text, block) => {
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      // a browser that keeps its clipboard from files: the text is selected, and Ctrl+C copies it
      getSelection().selectAllChildren(block);
      return "Selected";
    }
    return "Copied";
  };
  for (const button of document.querySelectorAll("button[data-copy]")) {
    button.hidden = false;
    button.addEventListener("click", async () => {
      const block = button.previousElementSibling;
      const done = await copy(block.textContent, block);
      button.textContent = done;
      status.textContent = `${done}: ${block.textContent}`;
      setTimeout(() => { button.textContent = "Copy"; }, 2000);
    });
  }
})();
