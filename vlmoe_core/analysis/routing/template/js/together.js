"use strict";

// Which experts are chosen for the same token.

function showTogether(section) {
  const cells = CELLS.filter((cell) => cell.together);
  const filters = new Filters(section, cells, [BY_TASK, BY_MODALITY, BY_LAYER]);
  const map = new Plot(plotGrid(section), "Tokens that chose both experts", true);
  filters.follow(([cell]) => map.show(() => pairMap(cell)));
}

// How much more often two experts are chosen together than if the choices were independent.
function pairMap(cell) {
  if (!cell.tokens) return { empty: `No token came to ${nameOf(cell)}.` };
  const experts = numbers(cell.num_experts);
  const z = cell.together.map((row, r) => row.map((count, c) => (r === c ? null : (100 * count) / cell.tokens)));
  const lift = (r, c) => ratio(cell.together[r][c] * cell.tokens, cell.together[r][r] * cell.together[c][c]);
  const [one, other] = highest(z);
  return heatMap({
    label: `Share of the tokens that chose both of two experts, ${nameOf(cell)}: ${one < 0 ? "there is one expert only" : `most, ${percent(z[one][other] / 100)}, chose ${one} and ${other}`}.`,
    x: experts, y: experts, z, xTitle: "expert", yTitle: "expert", unit: "share of the tokens (%)",
    value: per100,
    hover: (r, c) =>
      r === c
        ? `expert ${r}: ${whole(cell.together[r][r])} tokens`
        : `experts ${r} and ${c}\n${whole(cell.together[r][c])} tokens, ${fixed(lift(r, c))} times what independent choices give`,
  });
}
