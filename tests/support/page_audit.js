// What a reader would see wrong in the page that is open: a list of sentences.
(() => {
  const problems = [];
  const name = (element) => `<${element.localName}> "${element.textContent.trim().slice(0, 40)}"`;
  const visible = (element) => element.getClientRects().length > 0;
  const article = document.querySelector("article") || document.body;

  // what scrolls sideways on purpose: printed text, formulas, and on a phone tables of a notebook or of many columns
  const onAPhone = ".text_html, .table-wrapper:has(th:nth-child(6))";
  const scrolling = innerWidth < 600 ? `pre, div.math, ${onAPhone}` : "pre, div.math";
  const scrolls = (element) => {
    const box = element.closest(scrolling);
    return box && getComputedStyle(box).overflowX === "auto";
  };
  for (const element of article.querySelectorAll("table, img, math, pre, .sig")) {
    const right = element.getBoundingClientRect().right;
    if (visible(element) && !scrolls(element.parentElement) && right > innerWidth + 1)
      problems.push(`cut at ${innerWidth} px: ${name(element)} ends at ${Math.round(right)}`);
  }
  for (const element of article.querySelectorAll("div.highlight-python pre, td, th"))
    if (visible(element) && element.scrollWidth > element.clientWidth + 1)
      problems.push(`does not wrap: ${name(element)}`);
  for (const wrapper of article.querySelectorAll(".table-wrapper"))
    if (!scrolls(wrapper) && wrapper.scrollWidth > wrapper.clientWidth + 1)
      problems.push(`a table wider than the page: ${name(wrapper)}`);
  if (document.documentElement.scrollWidth > innerWidth + 1)
    problems.push(`the page is ${document.documentElement.scrollWidth} px wide`);

  for (const image of document.images) {
    if (!image.alt.trim() || /\.\w{3,4}$/.test(image.alt)) problems.push(`an image without alt text: ${image.src}`);
    if (!image.naturalWidth) problems.push(`an image that is not there: ${image.src}`);
  }

  for (const math of document.querySelectorAll("math")) {
    const { width, height } = math.getBoundingClientRect();
    if (visible(math) && (width < 3 || height < 5)) problems.push(`empty: ${name(math)}`);
    if (math.querySelector("merror, parsererror")) problems.push(`malformed: ${name(math)}`);
  }
  const walker = document.createTreeWalker(article, NodeFilter.SHOW_TEXT);
  for (let node; (node = walker.nextNode()); ) {
    if (node.parentElement.closest("pre, code, script, style")) continue;
    if (/\$[^$]+\$|\\[a-zA-Z]{2,}/.test(node.data))
      problems.push(`mathematics as typed: ${node.data.trim().slice(0, 60)}`);
  }
  return problems;
})()
