"use strict";

// Every section that the page has.

const SECTIONS = {
  loads: showLoads, drops: showDrops, depth: showDepth, told: showTold, pathways: showPathways, together: showTogether,
  atlas: showAtlas, overlays: showOverlays, comparison: showComparison,
};

for (const [name, show] of Object.entries(SECTIONS)) {
  const section = document.getElementById(name);
  if (section) show(section);
}
