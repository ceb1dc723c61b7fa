"use strict";
const controls = document.getElementById("controls");
const sheet = document.getElementById("cards");
const cards = [...sheet.children];

function value(card, name) {
  const text = card.getAttribute(`data-${name}`);
  return text === null ? null : Number(text);
}

function arrange() {
  const { sort, model, text } = Object.fromEntries(new FormData(controls));
  const sign = sort[0] === "-" ? -1 : 1;
  const name = sort.slice(1);
  const order = (a, b) => Number(a.dataset.order) - Number(b.dataset.order);
  const compare = (a, b) => {
    if (sort === "model") return a.dataset.model.localeCompare(b.dataset.model) || order(a, b);
    if (!sort) return order(a, b);
    const [x, y] = [value(a, name), value(b, name)];
    if (x === null || y === null) return (x === null) - (y === null) || order(a, b);
    return sign * (x - y) || order(a, b);
  };
  const wanted = text.trim().toLowerCase();
  let shown = 0;
  for (const card of cards) {
    const prompt = card.querySelector(".prompt").textContent.toLowerCase();
    card.hidden = (model !== "" && card.dataset.model !== model) || !prompt.includes(wanted);
    shown += !card.hidden;
  }
  sheet.append(...[...cards].sort(compare));
  document.getElementById("shown").textContent = `${shown} of ${cards.length}`;
}

controls.addEventListener("input", arrange);
controls.addEventListener("submit", (event) => event.preventDefault());
controls.hidden = false;
arrange();
