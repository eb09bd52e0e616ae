"use strict";

// The same tokens in this model and in another.

function showComparison(section) {
  const rows = SUMMARY.comparison;
  const plots = plotGrid(section);
  for (const modality of distinct(rows.map((row) => row.modality))) {
    new Plot(plots, `Shared information, ${modality}`).show(() => sharedLines(modality));
    new Plot(plots, `First choices of the same number, ${modality}`).show(() => sameLines(modality));
  }
  const filters = new Filters(section, rows, [BY_TASK, BY_MODALITY, BY_LAYER]);
  const map = new Plot(plotGrid(section), "First choices in both models", true);
  filters.follow(([row]) => map.show(() => meetMap(row)));
}

const comparedIn = (modality) => SUMMARY.comparison.filter((row) => row.modality === modality);

// One line per task of what value(row) gives.
function comparedLines(modality, ending, value) {
  return distinct(comparedIn(modality).map((row) => row.task)).map((task) => {
    const rows = comparedIn(modality).filter((row) => row.task === task).sort((a, b) => a.layer - b.layer);
    return {
      name: task + ending, x: rows.map((row) => row.layer), y: rows.map(value),
      text: rows.map(
        (row) =>
          `${nameOf(row)}\nshared information ${fixed(row.shared_information)}` +
          `\nsame number ${percent(row.same)}, by chance ${percent(row.chance)}\n${whole(row.tokens)} tokens`,
      ),
    };
  });
}

function sameLines(modality) {
  const same = comparedLines(modality, "", (row) => times100(row.same));
  const chance = comparedLines(modality, ", by chance", (row) => times100(row.chance));
  return layerLines({
    label: `Share of the ${modality} tokens whose first choice has the same number in both models, and by chance, one line per task over the layers.`,
    lines: [...same, ...chance], yTitle: "same number (%)", value: per100,
  });
}

function sharedLines(modality) {
  const values = comparedIn(modality).map((row) => row.shared_information).filter((value) => value !== null);
  return layerLines({
    label: `Shared information of the ${modality} tokens' first choices in both models, 0 to 1, one line per task over the layers: from ${fixed(Math.min(...values))} to ${fixed(Math.max(...values))}.`,
    lines: comparedLines(modality, "", (row) => row.shared_information), yTitle: "shared information", value: fixed,
  });
}

function meetMap(row) {
  const total = sum(row.counts.map(sum));
  if (!total) return { empty: `No token came to ${nameOf(row)}.` };
  const z = row.counts.map((counts) => counts.map((count) => (100 * count) / total));
  return heatMap({
    label: `Tokens by first choice in this model and in ${SUMMARY.other}, ${nameOf(row)}: ${percent(row.same)} have the same number, ${percent(row.chance)} by chance.`,
    x: numbers(row.counts[0].length), y: numbers(row.counts.length), z, xTitle: "expert of the other model", yTitle: "expert",
    unit: "share of the tokens (%)", value: per100,
    hover: (r, c) => `expert ${r} here, ${c} there\n${whole(row.counts[r][c])} tokens, ${percent(z[r][c] / 100)}`,
  });
}
