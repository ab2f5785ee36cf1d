/* Settings inside a PNG, as the program's own downloads carry them: one text chunk for each field of EditParams, and
`model`. https://www.w3.org/TR/png-3/#11textinfo. Chunks are length, type, data, CRC of type and data. */

const PNG_MAGIC = [137, 80, 78, 71, 13, 10, 26, 10];
const CRC_TABLE = Uint32Array.from({ length: 256 }, (_, n) => {
  for (let bit = 0; bit < 8; bit++) n = n & 1 ? 0xedb88320 ^ (n >>> 1) : n >>> 1;
  return n;
});

function crc32(bytes) {
  let crc = 0xffffffff;
  for (const byte of bytes) crc = CRC_TABLE[(crc ^ byte) & 255] ^ (crc >>> 8);
  return (crc ^ 0xffffffff) >>> 0;
}

/* One iTXt chunk: keyword, 0; not compressed: 0, 0; no language: 0, no translated keyword: 0; UTF-8 text. */
function textChunk(key, text) {
  const content = new TextEncoder().encode(`iTXt${key}\0\0\0\0\0${text}`);
  const chunk = new Uint8Array(content.length + 8), view = new DataView(chunk.buffer);
  view.setUint32(0, content.length - 4);
  chunk.set(content, 4);
  view.setUint32(content.length + 4, crc32(content));
  return chunk;
}

/* The PNG with these texts, {name: value}, right after its first chunk. */
async function pngWithTexts(blob, texts) {
  const afterHeader = 8 + 25;
  const chunks = Object.entries(texts).map(([key, value]) => textChunk(key, String(value)));
  return new Blob([blob.slice(0, afterHeader), ...chunks, blob.slice(afterHeader)], { type: "image/png" });
}

/* {name: text} of a PNG's tEXt and plain iTXt chunks; {} of anything else. */
async function textsOfPng(blob) {
  const bytes = new Uint8Array(await blob.arrayBuffer()), texts = {};
  if (!PNG_MAGIC.every((byte, i) => bytes[i] === byte)) return texts;
  const view = new DataView(bytes.buffer), latin = new TextDecoder("latin1"), utf8 = new TextDecoder();
  for (let at = 8; at + 12 <= bytes.length;) {
    const length = view.getUint32(at), type = latin.decode(bytes.subarray(at + 4, at + 8));
    if (at + 12 + length > bytes.length) break; // cut off
    const data = bytes.subarray(at + 8, at + 8 + length), zero = data.indexOf(0);
    if (type === "tEXt" && zero > 0) texts[latin.decode(data.subarray(0, zero))] = latin.decode(data.subarray(zero + 1));
    if (type === "iTXt" && zero > 0 && data[zero + 1] === 0) {
      const language = data.indexOf(0, zero + 3), keyword = data.indexOf(0, language + 1);
      if (keyword > 0) texts[latin.decode(data.subarray(0, zero))] = utf8.decode(data.subarray(keyword + 1));
    }
    at += 12 + length;
  }
  return texts;
}

/* The EditParams that such texts hold, each of its default's type; null where they are not ours. */
function paramsOfTexts(texts) {
  if (!["prompt", "seed", "steps"].every((name) => name in texts)) return null;
  const read = (text, usual) => {
    if (typeof usual === "boolean") return text.toLowerCase() === "true";
    if (typeof usual === "string") return text;
    return ["none", "null", ""].includes(text.toLowerCase()) ? null : Number(text); // numbers, or left open
  };
  return Object.fromEntries(Object.entries(props.defaults).filter(([name]) => name in texts)
    .map(([name, usual]) => [name, read(texts[name], usual)]));
}
