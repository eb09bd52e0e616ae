"use strict";

// How sure the router is, by depth.

function showDepth(section) {
  const overview = plotGrid(section);
  for (const modality of MODALITIES) {
    new Plot(overview, `Entropy, ${modality}`).show(() => sureLines(modality, "entropy", "entropy (nats)"));
    new Plot(overview, `Confidence, ${modality}`).show(() => sureLines(modality, "confidence", "largest gate"));
  }
  const filters = new Filters(section, CELLS, [BY_TASK, BY_MODALITY]);
  const detail = plotGrid(section);
  const entropy = new Plot(detail, "Tokens by entropy");
  const confidence = new Plot(detail, "Tokens by confidence");
  filters.follow((_, { task, modality }) => {
    entropy.show(() => sureBins(layersOf(task, modality), "entropy"));
    confidence.show(() => sureBins(layersOf(task, modality), "confidence"));
  });
}

function sureLines(modality, name, yTitle) {
  const tasks = TASKS.filter((task) => layersOf(task, modality).length);
  const lines = tasks.map((task) => {
    const cells = layersOf(task, modality).filter((cell) => cell.tokens);
    const spread = cells.map((cell) => cell[`${name}_std`]);
    return {
      name: task, x: cells.map((cell) => cell.layer), y: cells.map((cell) => cell[name]), low: spread, high: spread,
      text: cells.map((cell, c) => `${nameOf(cell)}\nmean ${fixed(cell[name])}\nstandard deviation ${fixed(spread[c])}`),
    };
  });
  const cells = CELLS.filter((cell) => cell.modality === modality && cell.tokens);
  if (!cells.length) return { empty: `No ${modality} token came.` };
  const means = cells.map((cell) => cell[name]);
  return layerLines({
    label: `Mean ${name} of the ${modality} tokens' gates, one line per task over the layers: from ${fixed(Math.min(...means))} to ${fixed(Math.max(...means))}.`,
    lines, yTitle, value: fixed,
    more: name === "entropy" ? [evenLine(cells)] : [],
  });
}

// The entropy of gates that are all the same.
function evenLine(cells) {
  const layers = distinct(cells.map((cell) => cell.layer)).sort((a, b) => a - b);
  const most = layers.map((layer) => Math.log(cells.find((cell) => cell.layer === layer).num_experts));
  return {
    type: "scatter", mode: "lines", name: "log E (even)", x: layers, y: most, hoverinfo: "skip",
    line: { color: themed("soft"), width: 1, dash: "dot" },
  };
}

function sureBins(cells, name) {
  const { task, modality } = cells[0];
  const isEntropy = name === "entropy";
  return binMap(cells, `${name}_histogram`, {
    label: `Tokens by ${isEntropy ? "entropy over log E" : "largest gate"}, ${task}, ${modality}, one row per layer.`,
    what: "tokens", unit: "share of the tokens (%)",
    xTitle: isEntropy ? "entropy (% of log E), from" : "largest gate (%), from",
  });
}
