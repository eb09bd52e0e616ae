"use strict";

// From expert to expert through the sparse layers.

const FLOWS = 40; // of each pair of layers: the strongest are drawn

function showPathways(section) {
  const flowing = CELLS.filter((cell) => cell.flow);
  const layer = { ...BY_LAYER, label: "Layers of the map", text: (number) => layerPair(flowing, number) };
  const filters = new Filters(section, flowing, [BY_TASK, BY_MODALITY, layer]);
  const plots = plotGrid(section);
  const all = new Plot(plots, `Strongest ${FLOWS} flows from each sparse layer to the next`, true);
  const pair = new Plot(plots, "Where the tokens of each expert go next", true);
  filters.follow(([cell], { task, modality }) => {
    all.show(() => flowPlot(layersOf(task, modality)));
    pair.show(() => flowMap(cell));
  });
}

const layerPair = (flowing, layer) => `layer ${flowing.find((cell) => cell.layer === layer).flow_from} to ${layer}`;

// [from, to, count], the largest first.
const flowsOf = (cell) =>
  cell.flow.flatMap((row, from) => row.map((count, to) => [from, to, count])).filter(([, , count]) => count).sort((a, b) => b[2] - a[2]);

function flowPlot(cells) {
  const nodes = new Map();
  const node = (layer, expert) => {
    const key = `${layer} ${expert}`;
    if (!nodes.has(key)) nodes.set(key, { layer, expert, place: nodes.size });
    return nodes.get(key).place;
  };
  const link = { source: [], target: [], value: [], customdata: [], color: [] };
  let shown = 0;
  let total = 0;
  for (const cell of cells.filter((one) => one.flow)) {
    total += sum(cell.flow.map(sum));
    for (const [from, to, count] of flowsOf(cell).slice(0, FLOWS)) {
      shown += count;
      link.source.push(node(cell.flow_from, from));
      link.target.push(node(cell.layer, to));
      link.value.push(count);
      link.customdata.push(`layer ${cell.flow_from}, expert ${from} to layer ${cell.layer}, expert ${to}: ${whole(count)} tokens`);
      link.color.push(`${colourOf(from)}80`);
    }
  }
  if (!shown) return { empty: "No token went through two sparse layers here." };
  return sankey(cells, [...nodes.values()], link, shown / total);
}

function sankey(cells, nodes, link, share) {
  const layers = cells.map((cell) => cell.layer);
  const { task, modality } = cells[0];
  const label = `Tokens that go from expert to expert, ${task}, ${modality}, from layer ${layers[0]} to ${layers[layers.length - 1]}, the strongest flows.`;
  return {
    label,
    note: `the flows shown hold ${percent(share)} of the tokens`,
    height: 460,
    traces: [{
      type: "sankey", arrangement: "fixed", textfont: { color: themed("ink"), size: 11 },
      node: {
        label: nodes.map(({ expert }) => String(expert)), color: nodes.map(({ expert }) => colourOf(expert)),
        customdata: nodes.map(({ layer, expert }) => `layer ${layer}, expert ${expert}`), pad: 6, thickness: 12,
        line: { width: 0 }, hovertemplate: "%{customdata}: %{value} tokens<extra></extra>",
      },
      link: { ...link, hovertemplate: "%{customdata}<extra></extra>" },
    }],
    layout: {
      margin: { l: 8, r: 8, t: 30, b: 8 },
      annotations: layers.map((layer, place) => ({
        xref: "paper", yref: "paper", x: place / Math.max(1, layers.length - 1), y: 1, yanchor: "bottom",
        xanchor: place === 0 ? "left" : place === layers.length - 1 ? "right" : "center", text: `layer ${layer}`, showarrow: false,
      })),
    },
    columns: ["Flow", "Tokens"],
    rows: link.customdata.map((text) => text.split(": ")),
  };
}

function flowMap(cell) {
  const total = sum(cell.flow.map(sum));
  if (!total) return { empty: "No token went through these two layers." };
  const z = cell.flow.map((row) => row.map((count) => times100(ratio(count, sum(row)))));
  const [from, to] = highest(z);
  return heatMap({
    label: `Share of the tokens of each expert of layer ${cell.flow_from} that go to each expert of layer ${cell.layer}, ${cell.task}, ${cell.modality}: most is ${percent(z[from][to] / 100)} from expert ${from} to expert ${to}.`,
    x: numbers(cell.num_experts), y: numbers(cell.flow.length), z, xTitle: `expert of layer ${cell.layer}`,
    yTitle: `expert of layer ${cell.flow_from}`, unit: "share of the row (%)",
    value: per100,
    hover: (r, c) => `layer ${cell.flow_from} expert ${r} to layer ${cell.layer} expert ${c}\n${whole(cell.flow[r][c])} tokens, ${percent(z[r][c] === null ? null : z[r][c] / 100)} of expert ${r}'s`,
  });
}
