"use strict";

// Which choices found no place: by task and depth, then by kind, place and sequence.

const droppedOf = (cell) => ratio(sum(cell.wanted) - sum(cell.got), sum(cell.wanted));

function showDrops(section) {
  const overview = plotGrid(section);
  for (const modality of MODALITIES) {
    new Plot(overview, `Dropped per task, ${modality}`).show(() => dropLines(modality));
  }
  const filters = new Filters(section, CELLS, [BY_TASK, BY_MODALITY]);
  const detail = plotGrid(section);
  const kinds = new Plot(detail, "By kind of token");
  const sequences = new Plot(detail, "By sequence");
  const places = new Plot(detail, "By place in the picture or text", true);
  filters.follow((_, { task, modality }) => {
    const cells = layersOf(task, modality);
    kinds.show(() => dropKinds(cells));
    sequences.show(() => dropSequences(cells));
    places.show(() => dropPlaces(cells));
  });
}

function dropLines(modality) {
  const tasks = TASKS.filter((task) => layersOf(task, modality).length);
  const lines = tasks.map((task) => {
    const cells = layersOf(task, modality);
    return {
      name: task,
      x: cells.map((cell) => cell.layer),
      y: cells.map((cell) => times100(droppedOf(cell))),
      text: cells.map((cell) => `${nameOf(cell)}\n${percent(droppedOf(cell))} of ${whole(sum(cell.wanted))} choices dropped`),
    };
  });
  const worst = CELLS.filter((cell) => cell.modality === modality).sort((a, b) => droppedOf(b) - droppedOf(a))[0];
  return layerLines({
    label: `Share of the ${modality} choices that were dropped, one line per task over the layers: most in ${nameOf(worst)}, ${percent(droppedOf(worst))}.`,
    lines, yTitle: "dropped (%)", value: per100,
  });
}

function dropKinds(cells) {
  const kinds = distinct(cells.flatMap((cell) => Object.keys(cell.dropped_by_kind)));
  const z = cells.map((cell) => kinds.map((kind) => times100(cell.dropped_by_kind[kind] ?? null)));
  return dropMap(cells, kinds, z, "kind of token", (r, c) => kinds[c]);
}

function dropPlaces(cells) {
  const places = numbers(Math.max(...cells.map((cell) => cell.dropped_by_place.length)));
  const z = cells.map((cell) => places.map((place) => times100(cell.dropped_by_place[place] ?? null)));
  return dropMap(cells, places, z, "place (0 is [CLS])", (r, c) => placeName(cells[r].modality, c, places.length));
}

function dropMap(cells, x, z, xTitle, name) {
  const [row, place] = highest(z);
  if (row < 0 || !z[row][place]) return { empty: "Nothing was dropped here." };
  const { task, modality } = cells[0];
  return heatMap({
    label: `Share of the choices that were dropped, ${task}, ${modality}, layers against ${xTitle}: most in layer ${cells[row].layer} at ${name(row, place)}, ${percent(z[row][place] / 100)}.`,
    x, y: cells.map((cell) => cell.layer), z, xTitle, yTitle: "layer", unit: "dropped choices (%)",
    value: per100,
    hover: (r, c) => `layer ${cells[r].layer}, ${name(r, c)}\n${z[r][c] === null ? "no token" : `${percent(z[r][c] / 100)} dropped`}`,
  });
}

// A place in words; patches stand by rows after [CLS], in a square where their number is one.
function placeName(modality, place, places) {
  if (place === 0) return "[CLS]";
  const side = Math.sqrt(places - 1);
  if (modality !== "vision" || !Number.isInteger(side)) return `place ${place}`;
  return `patch in row ${Math.floor((place - 1) / side) + 1}, column ${((place - 1) % side) + 1}`;
}

function dropSequences(cells) {
  const { task, modality } = cells[0];
  if (!cells.some(droppedOf)) return { empty: "Nothing was dropped here." };
  return binMap(cells, "dropped_share_histogram", {
    label: `Sequences by the share of their choices that was dropped, ${task}, ${modality}, one row per layer.`,
    xTitle: "dropped share of a sequence (%), from", unit: "share of the sequences (%)", what: "sequences",
  });
}

// Twenty bins of each cell, as a share of all.
function binMap(cells, name, { label, xTitle, unit, what }) {
  const bins = numbers(cells[0][name].length);
  const edge = (bin) => ((100 * bin) / bins.length).toFixed(0);
  const z = cells.map((cell) => cell[name].map((count) => times100(ratio(count, sum(cell[name])))));
  return heatMap({
    label, x: bins.map(edge), y: cells.map((cell) => cell.layer), z,
    xTitle, yTitle: "layer", unit, value: per100,
    hover: (r, c) => `layer ${cells[r].layer}, ${edge(c)} to ${edge(c + 1)}\n${whole(cells[r][name][c])} ${what}`,
  });
}
