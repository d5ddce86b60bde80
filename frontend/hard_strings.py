"""Texts on which tokenizers that are "nearly the same" differ.

The exported tokenizer must give the ids of the source tokenizer on every one of them. Written with escapes
where a character cannot be seen.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

_SCRIPTS: Final = (
    "The quick brown fox jumps over the lazy dog.",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich",
    "Le cœur déçu mais l'âme plutôt naïve, Louÿs rêva de crapaüter en canoë",
    "Příliš žluťoučký kůň úpěl ďábelské ódy",
    "İstanbul'da ılık rüzgâr, ŞIĞ göl",
    "Съешь же ещё этих мягких французских булок, да выпей чаю",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία",
    "דג סקרן שט בים מאוכזב ולפתע מצא חברה",
    "نص حكيم له سر قاطع وذو شأن عظيم مكتوب على ثوب أخضر",
    "یک روباه قهوه‌ای سریع از روی سگ تنبل می‌پرد",
    "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा रावण का सर्वनाश",
    "আমি বাংলায় গান গাই",
    "தமிழ் மொழி மிகவும் பழமையானது",
    "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า",
    "ကျွန်တော် မြန်မာစကား ပြောတတ်တယ်",
    "ខ្ញុំអាចញ៉ាំកញ្ចក់បាន",
    "我能吞下玻璃而不伤身体。",
    "後藤さんは、東京都に住んでいます。カタカナとひらがな。",
    "키스의 고유조건은 입술끼리 만나야 하고 특별한 기술은 필요치 않다",
    "მე შემიძლია მინის ჭამა",
    "Կրնամ ապակի ուտել",
    "ᚠᛇᚻ᛫ᛒᛦᚦ᛫ᚠᚱᚩᚠᚢᚱ᛫ᚠᛁᚱᚪ",
    "ᠮᠣᠩᠭᠣᠯ ᠪᠢᠴᠢᠭ",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟘𝟙𝟚 𝓼𝓬𝓻𝓲𝓹𝓽",
    "𠜎𠜱𠝹𠱓 rare Han",
    "Tiếng Việt có dấu thanh: ngã, hỏi, nặng",
    "mixed 中文 and English и русский in한국어one line",
)
_EMOJI: Final = (
    "😀",
    "😀😃😄😁",
    "family: 👨‍👩‍👧‍👦 done",
    "👩🏽‍💻 writes code",
    "🏳️‍🌈 🏴‍☠️ 🏴󠁧󠁢󠁥󠁮󠁧󠁿",
    "🇩🇪🇫🇷🇯🇵",
    "1️⃣2️⃣ #️⃣",
    "❤️ vs ❤",
    "text😀text😀 text 😀 text",
)
_SPACES: Final = (
    "",
    " ",
    "  ",
    "   ",
    "    ",
    " " * 17,
    " " * 40,
    "a b",
    "a  b",
    "a   b",
    " a",
    "  a",
    "   a",
    "a ",
    "a  ",
    "a   ",
    " a b ",
    "\n",
    "\n\n",
    "\n\n\n",
    "\n" * 20,
    "\t",
    "\t\t",
    "\t\t\t\ta",
    "a\tb",
    "a\t\tb",
    "a\nb",
    "a\n\nb",
    "a\n\n\nb",
    "a \nb",
    "a \n b",
    "a  \n  b",
    "a\r\nb",
    "a\r\n\r\nb",
    "a\rb",
    "\r\n",
    "\r",
    " \n \n ",
    "\t \n\t x",
    "line one\n    indented\n\tand tabs \n\n  end  ",
    "no\u00a0break\u00a0space",
    "thin\u2009and\u200bzero width",
    "ideographic\u3000space",
    "em\u2003space \u2003 twice",
    "next\u0085line and \u2028 separators \u2029",
    "ogham\u1680space, mongolian\u180evowel",
)
_NUMBERS: Final = (
    "0",
    "12",
    "123",
    "1234",
    "12345",
    "123456789",
    "3.14159",
    "1,234,567.89",
    "-273.15°C",
    "1e-10",
    "0x1F600",
    "2024-02-30T23:59:60Z",
    "+49 (0)30 1234567",
    "½ ⅔ ² ₃ Ⅳ ⑤",
    "٠١٢٣ ०१२३ ๐๑๒๓ １２３",
    "a1b2c3",
    "x2 2x 10th 3rd",
)
_WORDS: Final = (
    "I'm you're we've they'll he'd it's don't",
    "I'M YOU'RE WE'VE THEY'LL HE'D IT'S DON'T",
    "’s ’t ‘quoted’ “double” „low“",
    "'tis the season, rock 'n' roll",
    "don''t ''twice''",
    "camelCaseWord PascalCase snake_case_word kebab-case SCREAMING_SNAKE",
    "HTTPServer XMLHttpRequest iPhone15ProMax",
    "antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis",
    "e.g. i.e. U.S.A. Dr. Mr. etc...",
    "Hello,world!How are you?I'm fine;thanks:bye.",
    "...?!?!---***===~~~",
    "«guillemets» ¿qué? ¡sí! — dash – en",
    "…… 。。。 、、 ！！ ？？",
    "a.b,c;d:e!f?g",
    "user@example.com https://example.com/path?query=1&x=%20#frag",
    "C:\\Users\\name\\file.txt /usr/local/bin",
    "$100 €50 £20 ¥1000 ₿0.5",
    "^ ` ~ | < > = + $ # % & * @ _ \\ /",
    "!!!!!!!!!!!!!!!!!!!!!!!!",
)
_CODE: Final = (
    "def f(x):\n    return x ** 2  # square\n",
    "for (int i = 0; i < n; ++i) {\n\tsum += a[i];\n}\n",
    '{"key": [1, 2.5, null, true], "nested": {"a": "\\u00e9"}}',
    '<div class="a b">text &amp; more</div>\n<br/>',
    "SELECT * FROM t WHERE a='b' AND c<>1;",
    "```python\nprint('hi')\n```",
    "a->b(); x<<=2; y!==z; p&&q||r",
    "#!/bin/sh\nset -euo pipefail\n",
    "\\begin{equation} e^{i\\pi} + 1 = 0 \\end{equation}",
    "if a:\n        b\n            c\n",
)
_MARKS: Final = (
    "e\u0301 vs \u00e9",
    "a\u0308o\u0308u\u0308",
    "Z\u0351\u036b\u0343a\u0300\u0301\u0302l\u0323g\u0334o\u0335",
    "\u0301 mark first",
    "\ufb01ne \ufb03 ligatures ﬀ",
    "ﬃ \u212b \u00c5 \u2126",
    "\u1100\u1161\u11a8 jamo",
    "\u0e33 \u0e4d\u0e32",
    "ß ẞ ſ ŉ ǆ",
    "\u202eright to left override\u202c end",
    "\u200fRTL mark\u200e LRM",
    "soft\u00adhyphen joiner\u200d nonjoiner\u200c word\u2060joiner",
    "\ufeff",
    "\ufefftext after a mark",
    "text \ufeff inside",
    "\ufffd replacement \ufffc object",
    "private \ue000 use \U000f0000",
    "noncharacter \ufdd0 \U0001ffff",
    "\x01\x02\x03\x1b[31mred\x1b[0m\x7f",
    "nul \x00 inside",
    "unit\x1fseparator\x1cfile",
    "vertical\x0btab form\x0cfeed",
    "\x80\x9f latin control",
)
_LONG: Final = (
    "a" * 100,
    "ab" * 60,
    "=" * 70,
    "-" * 33,
    "_" * 19,
    "." * 50,
    "0" * 41,
    "哈" * 30,
    "😀" * 20,
    "é" * 25,
    "\u0301" * 12,
    "word " * 30,
    "loooooooooooooooooooooooong",
)
_SPELLED_TOKENS: Final = (
    "<s>",
    "</s>",
    "<unk>",
    "<pad>",
    "<bos><eos>",
    "[CLS] [SEP] [MASK] [UNK] [PAD]",
    "<|endoftext|>",
    "a<|im_start|>user\nhi<|im_end|>\n",
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>",
    "<start_of_turn>model\nyes<end_of_turn>",
    "[INST] hi [/INST]",
    "<0x0A> <0xE2><0x82>",
    "▁ ▁▁ a▁b",
    "Ġ Ċ Ā ĠĠa",
    "##ing ##",
    "< | im_start | >",
    "<|im_start",
    "<think></think> <tool_call>{}</tool_call>",
    "<unused1> <|fim_prefix|>",
)

HARD_STRINGS: Final[tuple[str, ...]] = (
    *_SCRIPTS, *_EMOJI, *_SPACES, *_NUMBERS, *_WORDS, *_CODE, *_MARKS, *_LONG, *_SPELLED_TOKENS,
)  # fmt: skip


def hard_strings(added_tokens: Iterable[str] = ()) -> list[str]:
    """The fixed texts, and the first tokens that a vocabulary matches whole, within and against other
    text.
    """
    out: list[str] = list(HARD_STRINGS)
    tokens = [token for token in added_tokens if token][:48]
    for token in tokens:
        out += [token, f"a{token}b", f" {token} {token}\n", f"{token[:-1]}", f"x {token}y"]
    if len(tokens) > 1:
        out.append("".join(tokens))
        out.append(" ".join(tokens))
    return out
