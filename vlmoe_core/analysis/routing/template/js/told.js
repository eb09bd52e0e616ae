"use strict";

// What the choice of an expert tells of a token: information over the control, and shares by kind and place.

function showTold(section) {
  const filters = new Filters(section, CELLS, [BY_TASK, BY_MODALITY, { ...BY_LAYER, label: "Layer of the maps" }]);
  const plots = plotGrid(section);
  const information = new Plot(plots, "Information over the control, by layer");
  const kinds = new Plot(plots, "First choices by kind of token");
  const places = new Plot(plots, "First choices by place", true);
  filters.follow(([cell], { task, modality }) => {
    information.show(() => toldLines(layersOf(task, modality)));
    kinds.show(() => kindMap(cell));
    places.show(() => placeMap(cell));
  });
}

function toldLines(cells) {
  const labels = distinct(cells.flatMap((cell) => Object.keys(cell.information)));
  if (!labels.length) return { empty: "No labels are known of these tokens." };
  const lines = labels.map((label) => {
    const known = cells.filter((cell) => cell.information[label] && cell.information[label].bits !== null);
    const found = known.map((cell) => cell.information[label]);
    const excess = found.map((one) => one.bits - one.control);
    return {
      name: label, x: known.map((cell) => cell.layer), y: excess,
      low: found.map((one, n) => Math.max(0, excess[n] - (one.low ?? excess[n]))),
      high: found.map((one, n) => Math.max(0, (one.high ?? excess[n]) - excess[n])),
      text: found.map(
        (one, n) =>
          `${label}, layer ${known[n].layer}\n${fixed(excess[n])} bits over chance (${fixed(one.low)} to ${fixed(one.high)})` +
          `\ncounted ${fixed(one.bits)}, by chance ${fixed(one.control)}\n${whole(one.labels)} labels of ${fixed(one.label_bits)} bits`,
      ),
    };
  });
  const tops = lines.map((line) => line.y[largest(line.y)] ?? null);
  const best = largest(tops);
  const { task, modality } = cells[0];
  return layerLines({
    label: `Bits that the first choice tells of each label over chance, ${task}, ${modality}, over the layers, with 95 % intervals over the shuffles: most of the ${labels[best]}, ${fixed(tops[best])} bits.`,
    lines, yTitle: "bits over chance", value: fixed,
  });
}

function kindMap(cell) {
  const kinds = Object.keys(cell.kinds).filter((kind) => sum(cell.kinds[kind]));
  if (!kinds.length) return { empty: `No token came to ${nameOf(cell)}.` };
  const z = kinds.map((kind) => cell.kinds[kind].map((count) => times100(ratio(count, sum(cell.kinds[kind])))));
  const [row, expert] = highest(z);
  return heatMap({
    label: `Share of each kind of token that each expert gets first, ${nameOf(cell)}: most is ${percent(z[row][expert] / 100)} of ${kinds[row]} at expert ${expert}.`,
    x: numbers(cell.num_experts), y: kinds, z, xTitle: "expert", yTitle: "", unit: "share of the kind (%)",
    value: per100,
    hover: (r, c) => `${kinds[r]}, expert ${c}\n${whole(cell.kinds[kinds[r]][c])} tokens, ${percent(z[r][c] / 100)} of the kind`,
  });
}

// The report's places are shares in thousandths.
function placeMap(cell) {
  if (!cell.places.length) return { empty: `No token came to ${nameOf(cell)}.` };
  const experts = numbers(cell.num_experts);
  const z = experts.map((expert) => cell.places.map((shares) => shares[expert] / 10));
  const [expert, place] = highest(z);
  const where = placeName(cell.modality, place, cell.places.length);
  return heatMap({
    label: `Share of the tokens at each place that each expert gets first, ${nameOf(cell)}: most is ${percent(z[expert][place] / 100)} of ${where} at expert ${expert}.`,
    x: numbers(cell.places.length), y: experts, z, xTitle: "place (0 is [CLS])", yTitle: "expert", unit: "share of the place (%)",
    value: per100,
    hover: (r, c) => `expert ${r}, ${placeName(cell.modality, c, cell.places.length)}\n${percent(z[r][c] / 100)} of the tokens there`,
  });
}
