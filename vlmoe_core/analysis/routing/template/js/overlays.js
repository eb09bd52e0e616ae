"use strict";

// One example in all sparse layers: every patch and word in its expert's colour.

const CELL = 36; // pixels of a patch on the canvas

function showOverlays(section) {
  const number = {
    name: "example", label: "Example", of: (example) => DATA.examples.indexOf(example),
    text: (place) => `${place + 1}. ${DATA.examples[place].name} (${DATA.examples[place].task})`,
  };
  const filters = new Filters(section, DATA.examples, [number]);
  const numbered = make("input", { type: "checkbox" });
  filters.bar.append(make("label", { class: "check" }, numbered, "Numbers on the patches"));
  const area = section.appendChild(make("div", {}));
  whenSeen(section, () => {
    let view;
    filters.follow(([example]) => (view = new Overlay(area, example, numbered.checked)));
    numbered.addEventListener("change", () => view.setNumbers(numbered.checked));
  });
}

class Overlay {
  constructor(area, example, numbers) {
    Object.assign(this, { example, numbers, cursor: null, lit: { vision: null, text: null } });
    this.readout = make("p", { class: "readout", role: "status" }, "");
    this.canvases = [];
    this.chips = [];
    const patched = example.layers.filter((layer) => layer.patch_experts.length);
    const worded = example.layers.filter((layer) => layer.word_experts.length);
    area.replaceChildren(
      ...this.legend("vision", patched.flatMap((layer) => layer.patch_experts)),
      make("div", { class: "layers" }, ...patched.map((layer) => this.picture(layer))),
      ...(patched.length ? [this.readout] : []),
      ...this.legend("text", worded.flatMap((layer) => layer.word_experts)),
      make("div", { class: "said" }, ...worded.flatMap((layer) => this.sentence(layer))),
    );
    this.loadImage();
    this.say();
  }

  legend(modality, experts) {
    if (!experts.length) return [];
    const buttons = distinct(experts).sort((a, b) => a - b).map((expert) => {
      const button = make("button", { type: "button", "aria-pressed": "false", "aria-label": `Show ${modality} expert ${expert} alone` }, swatch(expert), String(expert));
      button.addEventListener("click", () => {
        this.lit[modality] = this.lit[modality] === expert ? null : expert;
        buttons.forEach((one) => one.setAttribute("aria-pressed", String(one === button && this.lit[modality] === expert)));
        this.draw();
      });
      return button;
    });
    const name = modality === "vision" ? "Experts of the patches" : "Experts of the words";
    return [
      make("p", { class: "legend-name" }, `${name} (choose one to see it alone; a cross or a line through marks a dropped token)`),
      make("div", { class: "legend", role: "group", "aria-label": name }, ...buttons),
    ];
  }

  picture(layer) {
    const [rows, columns] = layer.grid;
    const canvas = make("canvas", {
      width: columns * CELL, height: rows * CELL, tabindex: "0", role: "application",
      "aria-label": `Layer ${layer.layer}: the picture with the expert of every patch. Arrow keys move over the patches.`,
    });
    canvas.addEventListener("pointermove", (event) => {
      const box = canvas.getBoundingClientRect();
      const row = Math.floor(((event.clientY - box.top) / box.height) * rows);
      const column = Math.floor(((event.clientX - box.left) / box.width) * columns);
      if (row >= 0 && row < rows && column >= 0 && column < columns) this.moveTo(row * columns + column);
    });
    canvas.addEventListener("pointerleave", () => document.activeElement !== canvas && this.moveTo(null));
    canvas.addEventListener("focus", () => this.moveTo(this.cursor ?? 0));
    canvas.addEventListener("blur", () => this.moveTo(null));
    canvas.addEventListener("keydown", (event) => this.key(event, layer.grid));
    this.canvases.push({ canvas, layer });
    const dropped = layer.patch_kept.filter((kept) => !kept).length;
    return make("figure", {}, make("figcaption", {}, `Layer ${layer.layer} `, make("span", { class: "of" }, `${dropped} dropped`)), canvas);
  }

  key(event, [rows, columns]) {
    const step = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
    if (!step) return;
    event.preventDefault();
    const row = Math.floor((this.cursor ?? 0) / columns) + step[0];
    const column = ((this.cursor ?? 0) % columns) + step[1];
    if (row >= 0 && row < rows && column >= 0 && column < columns) this.moveTo(row * columns + column);
  }

  moveTo(place) {
    if (place === this.cursor) return;
    this.cursor = place;
    this.draw();
    this.say();
  }

  say() {
    if (this.cursor === null || !this.canvases.length) {
      this.readout.textContent = "Point at a patch, or move over the patches with the arrow keys, to read its expert in every layer.";
      return;
    }
    const columns = this.canvases[0].layer.grid[1];
    const told = this.canvases.map(
      ({ layer }) => `layer ${layer.layer} expert ${layer.patch_experts[this.cursor]}${layer.patch_kept[this.cursor] ? "" : " (dropped)"}`,
    );
    this.readout.textContent = `Row ${Math.floor(this.cursor / columns) + 1}, column ${(this.cursor % columns) + 1}: ${told.join(", ")}`;
  }

  loadImage() {
    this.image = null;
    this.draw();
    if (this.example.picture === null) return;
    const image = new Image();
    image.onload = () => {
      this.image = image;
      this.draw();
    };
    image.src = DATA.pictures[this.example.picture];
  }

  setNumbers(numbers) {
    this.numbers = numbers;
    this.draw();
  }

  draw() {
    for (const { canvas, layer } of this.canvases) this.drawLayer(canvas, layer);
    for (const { chip, expert } of this.chips) chip.classList.toggle("away", this.lit.text !== null && this.lit.text !== expert);
  }

  drawLayer(canvas, layer) {
    const pen = canvas.getContext("2d");
    const columns = layer.grid[1];
    pen.clearRect(0, 0, canvas.width, canvas.height);
    if (this.image) pen.drawImage(this.image, 0, 0, canvas.width, canvas.height);
    layer.patch_experts.forEach((expert, place) => {
      if (this.lit.vision !== null && this.lit.vision !== expert) return;
      const x = (place % columns) * CELL;
      const y = Math.floor(place / columns) * CELL;
      drawPatch(pen, x, y, expert, layer.patch_kept[place], this.numbers);
    });
    if (this.cursor !== null) drawCursor(pen, (this.cursor % columns) * CELL, Math.floor(this.cursor / columns) * CELL);
  }

  sentence(layer) {
    const items = layer.word_experts.map((expert, place) => {
      const kept = layer.word_kept[place];
      const told = `expert ${expert}${kept ? "" : ", dropped"}`;
      const chip = make(
        "li", { style: `border-color: ${colourOf(expert)}`, title: told },
        make("span", { class: "word" }, this.example.words[place] ?? ""),
        make("small", { "aria-label": told }, String(expert)),
      );
      if (!kept) chip.setAttribute("data-dropped", "");
      this.chips.push({ chip, expert });
      return chip;
    });
    return [make("span", {}, `Layer ${layer.layer}`), make("ul", { class: "sentence", "aria-label": `Words in layer ${layer.layer}` }, ...items)];
  }
}

function drawPatch(pen, x, y, expert, kept, numbered) {
  pen.globalAlpha = 0.58;
  pen.fillStyle = colourOf(expert);
  pen.fillRect(x, y, CELL, CELL);
  pen.globalAlpha = 1;
  pen.strokeStyle = colourOf(expert);
  pen.lineWidth = 2;
  pen.strokeRect(x + 1, y + 1, CELL - 2, CELL - 2);
  if (!kept) drawCross(pen, x, y);
  if (numbered) drawNumber(pen, x, y, expert);
}

function drawCross(pen, x, y) {
  for (const [colour, width] of [["#000", 4.5], ["#fff", 2]]) {
    pen.strokeStyle = colour;
    pen.lineWidth = width;
    pen.beginPath();
    pen.moveTo(x + 7, y + 7);
    pen.lineTo(x + CELL - 7, y + CELL - 7);
    pen.moveTo(x + CELL - 7, y + 7);
    pen.lineTo(x + 7, y + CELL - 7);
    pen.stroke();
  }
}

function drawNumber(pen, x, y, expert) {
  pen.font = "600 18px system-ui, sans-serif";
  pen.textAlign = "center";
  pen.textBaseline = "middle";
  pen.lineWidth = 3.5;
  pen.strokeStyle = "#000";
  pen.strokeText(expert, x + CELL / 2, y + CELL / 2 + 1);
  pen.fillStyle = "#fff";
  pen.fillText(expert, x + CELL / 2, y + CELL / 2 + 1);
}

function drawCursor(pen, x, y) {
  for (const [colour, width] of [["#000", 7], ["#fff", 3]]) {
    pen.strokeStyle = colour;
    pen.lineWidth = width;
    pen.strokeRect(x + 2, y + 2, CELL - 4, CELL - 4);
  }
}
