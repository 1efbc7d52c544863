"use strict";
/**
 * A GIF that begins again for ever, as bytes.
 *
 * frames: each the pixels of a canvas, as getImageData has them, all of one size. delays: how long each stays, in ms.
 * All share one palette of 255 colours; the 256th says that a pixel is as in the frame before.
 */
function encodeGif(frames, delays, width, height) {
  const SAME = 255;
  const LONGEST = 4096; // as many codes as LZW may have

  /** A colour by five bits of each channel. */
  const coarse = (pixels, i) => ((pixels[i] >> 3) << 10) | ((pixels[i + 1] >> 3) << 5) | (pixels[i + 2] >> 3);

  /** Median cut: again and again the box that matters most is halved along its longest side. */
  function choosePalette() {
    const count = new Uint32Array(32768);
    const sums = new Float64Array(3 * 32768);
    for (const pixels of frames) {
      for (let i = 0; i < pixels.length; i += 4) {
        const colour = coarse(pixels, i);
        count[colour]++;
        for (let c = 0; c < 3; c++) sums[3 * colour + c] += pixels[i + c];
      }
    }
    const channel = (colour, c) => (colour >> (10 - 5 * c)) & 31;
    const boxOf = (colours) => {
      const box = { colours, pixels: colours.reduce((sum, colour) => sum + count[colour], 0), side: 0, length: 0 };
      for (let c = 0; c < 3; c++) {
        const values = colours.map((colour) => channel(colour, c));
        const length = Math.max(...values) - Math.min(...values);
        if (length > box.length) Object.assign(box, { side: c, length });
      }
      box.weight = box.length * Math.sqrt(box.pixels);
      return box;
    };
    const present = Array.from(count.keys()).filter((colour) => count[colour] > 0);
    const boxes = [boxOf(present)];
    while (boxes.length < SAME) {
      const box = boxes.reduce((best, other) => (other.weight > best.weight ? other : best));
      if (box.weight === 0) break; // each holds a single colour
      const colours = box.colours.sort((a, b) => channel(a, box.side) - channel(b, box.side));
      let [at, below] = [1, count[colours[0]]];
      while (at < colours.length - 1 && 2 * below < box.pixels) below += count[colours[at++]];
      boxes.splice(boxes.indexOf(box), 1, boxOf(colours.slice(0, at)), boxOf(colours.slice(at)));
    }
    const palette = new Uint8Array(3 * 256);
    const nearest = new Uint8Array(32768);
    boxes.forEach(({ colours, pixels }, i) => {
      for (const colour of colours) nearest[colour] = i;
      for (let c = 0; c < 3; c++) {
        palette[3 * i + c] = Math.round(colours.reduce((sum, colour) => sum + sums[3 * colour + c], 0) / pixels);
      }
    });
    return { palette, nearest };
  }

  /** Indices as LZW codes of 9 to 12 bits, in blocks of up to 255 bytes. */
  function compress(indices) {
    const [CLEAR, END] = [256, 257];
    const bytes = [];
    let [held, bits] = [0, 0];
    let size = 9;
    const put = (code) => {
      held |= code << bits;
      bits += size;
      for (; bits >= 8; bits -= 8, held >>>= 8) bytes.push(held & 255);
    };
    const longer = new Uint16Array(256 * LONGEST); // the code of a code and an index after it; 0: none yet
    let next = END + 1;
    put(CLEAR);
    let code = indices[0];
    for (let i = 1; i < indices.length; i++) {
      const both = 256 * code + indices[i];
      if (longer[both]) {
        code = longer[both];
        continue;
      }
      put(code);
      code = indices[i];
      if (next === LONGEST) {
        put(CLEAR);
        longer.fill(0);
        [next, size] = [END + 1, 9];
        continue;
      }
      if (next === 1 << size) size++;
      longer[both] = next++;
    }
    put(code);
    if (next === 1 << size && size < 12) size++; // as a decoder does after its last code
    put(END);
    if (bits > 0) bytes.push(held & 255);
    const blocks = [];
    for (let i = 0; i < bytes.length; i += 255) {
      const block = bytes.slice(i, i + 255);
      blocks.push(block.length, ...block);
    }
    return [8, ...blocks, 0];
  }

  const word = (value) => [value & 255, value >> 8];
  const text = (letters) => Array.from(letters, (letter) => letter.charCodeAt(0));
  const { palette, nearest } = choosePalette();
  const parts = [[...text("GIF89a"), ...word(width), ...word(height), 0xf7, 0, 0], palette];
  parts.push([0x21, 0xff, 11, ...text("NETSCAPE2.0"), 3, 1, 0, 0, 0]); // again, for ever
  let before = null;
  frames.forEach((pixels, i) => {
    const own = new Uint8Array(width * height);
    for (let at = 0; at < own.length; at++) own[at] = nearest[coarse(pixels, 4 * at)];
    const indices = before === null ? own : own.map((index, at) => (index === before[at] ? SAME : index));
    before = own;
    parts.push([0x21, 0xf9, 4, 0x05, ...word(Math.round(delays[i] / 10)), SAME, 0]);
    parts.push([0x2c, 0, 0, 0, 0, ...word(width), ...word(height), 0], compress(indices));
  });
  return new Blob([...parts.map((part) => Uint8Array.from(part)), Uint8Array.of(0x3b)], { type: "image/gif" });
}
