"use strict";

// What each expert likes: words, patches, places on the picture.

function showAtlas(section) {
  const filters = new Filters(section, CELLS, [BY_TASK, BY_MODALITY, BY_LAYER, BY_EXPERT]);
  const list = section.appendChild(make("ul", { class: "experts" }));
  const show = ([cell], { expert }) => {
    const experts = expert === null ? numbers(cell.num_experts) : [expert];
    const most = Math.max(...cell.places.slice(1).flat(), 1);
    list.replaceChildren(...experts.map((one) => expertCard(cell, one, most)));
  };
  whenSeen(section, () => {
    filters.follow(show);
    document.addEventListener("themechange", () => filters.update());
  });
}

function expertCard(cell, expert, most) {
  const share = ratio(cell.first[expert], sum(cell.first));
  const head = make(
    "header", {}, swatch(expert), make("h3", {}, `Expert ${expert}`),
    make("span", { class: "of" }, cell.first[expert] ? `${percent(share)} of first choices` : "no first choice"),
  );
  const found = [wordPart(cell.words[expert] ?? []), placePart(cell, expert, most), cropPart(cell, expert)].filter(Boolean);
  const parts = found.length ? found : [make("p", { class: "empty" }, "Nothing to show.")];
  return make("li", { class: "expert", "data-expert": expert }, head, make("div", { class: "parts" }, ...parts));
}

const part = (title, content) => make("div", { class: "part" }, make("h4", {}, title), content);

function wordPart(words) {
  if (!words.length) return null;
  const items = words.map(({ word, count, lift }) =>
    make("li", { title: `${whole(count)} tokens` }, word, " ", make("span", { class: "of" }, `×${lift === null ? "?" : lift.toFixed(1)}`)),
  );
  return part("Words, with lift over their share of all words", make("ul", { class: "words" }, ...items));
}

function cropPart(cell, expert) {
  if (cell.modality !== "vision") return null;
  const liked = DATA.patches.filter((one) => one.task === cell.task && one.layer === cell.layer && one.expert === expert);
  if (!liked.length) return null;
  liked.sort((a, b) => b.gate - a.gate);
  return part("Patches and gates", make("ul", { class: "crops" }, ...liked.map(crop)));
}

function crop(patch) {
  const [left, top, right, bottom] = patch.box.map((share) => 100 * share);
  const box = `left: ${left}%; top: ${top}%; width: ${right - left}%; height: ${bottom - top}%`;
  const told = `${patch.example}, patch ${patch.place}, gate ${fixed(patch.gate)}`;
  const picture = make("img", { src: DATA.pictures[patch.picture], alt: told });
  const frame = make("span", { class: "crop", title: told }, picture, make("span", { class: "box", style: box }));
  const name = make("span", { class: "of name" }, patch.example);
  return make("li", {}, frame, make("span", { class: "of" }, fixed(patch.gate)), name);
}

// A square of the expert's share of each patch's tokens.
function placePart(cell, expert, most) {
  const side = Math.sqrt(cell.places.length - 1);
  if (cell.modality !== "vision" || !Number.isInteger(side) || side < 2) return null;
  const shares = cell.places.slice(1).map((row) => row[expert]);
  const best = largest(shares);
  if (!shares[best]) return null;
  const label = `Where expert ${expert} is chosen: most in row ${Math.floor(best / side) + 1}, column ${(best % side) + 1}, for ${percent(shares[best] / 1000)} of the tokens there.`;
  const canvas = make("canvas", { class: "where", role: "img", "aria-label": label, title: label, width: side, height: side });
  const pen = canvas.getContext("2d");
  pen.fillStyle = themed("high");
  shares.forEach((share, place) => {
    pen.globalAlpha = share / most;
    pen.fillRect(place % side, Math.floor(place / side), 1, 1);
  });
  return part("Places", canvas);
}
