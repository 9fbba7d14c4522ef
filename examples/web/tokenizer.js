// A byte-level tokenizer without merges, which is what nano has: every byte is one token. tokenizer.json says which.

const utf8 = { to: new TextEncoder(), from: new TextDecoder() };

/** Byte-level files spell a byte as one printable character: itself, or the next one from U+0100 on (GPT-2's table). */
function byteSpellings() {
  const printable = (b) => (b >= 0x21 && b <= 0x7e) || (b >= 0xa1 && b <= 0xac) || b >= 0xae;
  let next = 0x100;
  return Array.from({ length: 256 }, (_, byte) => String.fromCodePoint(printable(byte) ? byte : next++));
}

export class Tokenizer {
  /** file: a parsed tokenizer.json. Throws an Error if it is of another kind. */
  constructor(file) {
    const { model, pre_tokenizer: split } = file;
    if (model.type !== "BPE" || model.merges.length || split?.type !== "ByteLevel" || split.add_prefix_space) {
      throw new Error("tokenizer.json: this page reads byte-level tokenizers without merges only");
    }
    this.special = new Map(file.added_tokens.map((token) => [token.id, token.content]));
    this.ofByte = byteSpellings().map((spelling) => model.vocab[spelling]);
    this.byteOf = new Map(this.ofByte.map((id, byte) => [id, byte]));
  }

  /** Text, in which special tokens are not looked for → token ids. */
  encode(string) {
    return Array.from(utf8.to.encode(string), (byte) => this.ofByte[byte]);
  }

  /** Token ids → text, special tokens left out. */
  decode(tokens) {
    return utf8.from.decode(Uint8Array.from(tokens.filter((id) => this.byteOf.has(id)), (id) => this.byteOf.get(id)));
  }

  /** What one token is called where it is shown alone. */
  name(id) {
    const byte = this.byteOf.get(id);
    if (byte === undefined) return this.special.get(id) ?? `token ${id}`;
    if (byte === 0x0a) return "line break";
    return byte > 0x20 && byte < 0x7f ? String.fromCharCode(byte) : `byte ${byte}`;
  }
}
