"use strict";
// Everything is drawn already: this moves a cursor over it, tells what is there, and changes what is shown.

const data = JSON.parse(document.getElementById("data").textContent);
const bins = data.edges.length - 1;
const byId = (id) => document.getElementById(id);
const number = (value) => value.toLocaleString("en");

function stepsOf(bin) {
  const [first, last] = [data.edges[bin], data.edges[bin + 1] - 1];
  return first === last ? `Step ${number(first)}` : `Steps ${number(first)} to ${number(last)}`;
}

// A cursor over a drawing of rows and columns, for pointer and keyboard. Returns what tells anew what is under it.
function follow(id, rows, columns, tell, choose = () => {}) {
  const plot = byId(id).querySelector(".plot");
  const cursor = plot.querySelector(".cursor");
  let row = 0, column = 0, isShown = false;

  function show() {
    isShown = true;
    cursor.hidden = false;
    cursor.style.cssText = `left:${(100 * column) / columns}%; top:${(100 * row) / rows}%;`
      + `width:${100 / columns}%; height:${100 / rows}%`;
    byId(`${id}-told`).textContent = tell(row, column);
  }

  function point(event) {
    const box = plot.getBoundingClientRect();
    const at = (place, length, count) => Math.min(Math.max(Math.floor((place / length) * count), 0), count - 1);
    row = at(event.clientY - box.top, box.height, rows);
    column = at(event.clientX - box.left, box.width, columns);
    show();
  }

  plot.addEventListener("pointermove", point);
  plot.addEventListener("click", (event) => { point(event); choose(row, column); });
  plot.addEventListener("focus", show);
  plot.addEventListener("keydown", (event) => {
    const moves = {
      ArrowLeft: () => { column = Math.max(column - 1, 0); },
      ArrowRight: () => { column = Math.min(column + 1, columns - 1); },
      ArrowUp: () => { row = Math.max(row - 1, 0); },
      ArrowDown: () => { row = Math.min(row + 1, rows - 1); },
      Home: () => { column = 0; },
      End: () => { column = columns - 1; },
      Enter: () => choose(row, column),
    };
    if (!(event.key in moves)) return;
    event.preventDefault();
    moves[event.key]();
    show();
  });
  return () => { if (isShown) show(); };
}

// What the levels of a picture's pixels are, read back from their colours.
function reader(image, scaleOf) {
  let pixels = null, source = null;
  const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  return (row, column) => {
    if (!image.complete || !image.naturalWidth) return "";
    if (source !== image.src) {
      source = image.src;
      context.canvas.width = image.naturalWidth;
      context.canvas.height = image.naturalHeight;
      context.drawImage(image, 0, 0);
      pixels = context.getImageData(0, 0, image.naturalWidth, image.naturalHeight).data;
    }
    const at = 4 * (row * image.naturalWidth + column);
    const hex = [0, 1, 2].map((i) => pixels[at + i].toString(16).padStart(2, "0")).join("");
    const scale = data.scales[scaleOf()];
    return scale.words[scale.colours.indexOf(`#${hex}`)] ?? "no tokens";
  };
}

document.documentElement.classList.add("js");

// Balancedness: which lines are shown.
const tellBalance = follow("balance", 1, bins, (_, bin) => {
  const shown = data.series.filter(({ name }) => byId(`series-${name}`).checked);
  const words = shown.map(({ name, values }) => `${name} ${values[bin] === null ? "no tokens" : values[bin].toFixed(3)}`);
  return `${stepsOf(bin)}: ${words.join(", ") || "no line is shown"}`;
});
for (const box of document.querySelectorAll("input[data-toggles]")) {
  box.addEventListener("change", () => {
    const line = document.querySelector(`#balance [data-series="${box.dataset.toggles}"]`);
    line.toggleAttribute("hidden", !box.checked);
    tellBalance();
  });
}

// Layers over time: what is shown of them, and which layer's experts.
const view = byId("view");
const layersImage = byId("layers").querySelector("img");
const readLayers = reader(layersImage, () => data.views[view.value].scale);
const tellLayers = follow(
  "layers",
  data.layers,
  bins,
  (layer, bin) => `${stepsOf(bin)}, layer ${layer}: ${data.views[view.value].what} ${readLayers(layer, bin)}`,
  (layer) => { choice.value = layer; showLayer(); },
);
view.addEventListener("change", async () => {
  const chosen = data.views[view.value];
  layersImage.src = chosen.source;
  layersImage.alt = chosen.text;
  for (const each of document.querySelectorAll("#layers-legends > *")) each.hidden = each.dataset.scale !== chosen.scale;
  await layersImage.decode();
  tellLayers();
});

// The experts of one layer.
const choice = byId("layer");
const expertsImage = byId("experts").querySelector("img");
const readExperts = reader(expertsImage, () => "share");
const tellExperts = follow("experts", data.experts, bins, (expert, bin) =>
  `${stepsOf(bin)}, layer ${choice.value}, expert ${expert}: ${readExperts(expert, bin)}`);
async function showLayer() {
  const layer = Number(choice.value);
  byId("layer-name").textContent = layer;
  byId("previous").disabled = layer === 0;
  byId("next").disabled = layer === data.layers - 1;
  expertsImage.src = data.pictures[layer];
  expertsImage.alt = `Load of the experts of layer ${layer} over time`;
  await expertsImage.decode();
  tellExperts();
}
choice.addEventListener("change", showLayer);
for (const [id, by] of [["previous", -1], ["next", 1]]) {
  byId(id).addEventListener("click", () => { choice.value = Number(choice.value) + by; showLayer(); });
}
showLayer();

// Moves: the decision that is nearest to the cursor.
if (byId("moves-chart")) {
  const columns = 200;
  follow("moves-chart", 1, columns, (_, column) => {
    const step = ((column + 0.5) / columns) * data.edges[bins];
    const near = (a, b) => (Math.abs(b.step - step) < Math.abs(a.step - step) ? b : a);
    return data.decisions.reduce(near).text;
  });
}

// Paper has no folds to open: the layers are printed, the many decisions only if they were opened.
let folded = [];
window.addEventListener("beforeprint", () => {
  folded = [...document.querySelectorAll("details[data-print]:not([open])")];
  for (const each of folded) each.open = true;
});
window.addEventListener("afterprint", () => { for (const each of folded) each.open = false; });
