"use strict";
// A link of the strip opens what it leads to; a browser that opens details by itself only does it twice.
function reveal() {
  const target = document.getElementById(location.hash.slice(1));
  for (let box = target; box; box = box.parentElement) if (box.tagName === "DETAILS") box.open = true;
  if (target) { target.scrollIntoView({ block: "center" }); target.querySelector("summary")?.focus({ preventScroll: true }); }
}
addEventListener("hashchange", reveal);
if (location.hash) reveal();
for (const button of document.querySelectorAll("button[data-copy]")) {
  button.hidden = false;
  button.addEventListener("click", async () => {
    const code = document.getElementById(button.dataset.copy), said = document.getElementById("said");
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = said.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(code);
      button.textContent = said.textContent = "Selected: press Ctrl+C";
    }
    setTimeout(() => { button.textContent = "Copy"; said.textContent = ""; }, 2500);
  });
}
// A short report is printed whole, a long one as it is on the screen.
addEventListener("beforeprint", () => {
  const boxes = document.querySelectorAll("details");
  if (boxes.length <= 60) for (const box of boxes) box.open = true;
});
