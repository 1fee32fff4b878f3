"""Email addresses, valid and invalid."""

VALID = [
    *["a@example.com", "first.last+tag@sub.example.co.uk", "o'hara@example.com"],
    *["!#$%&'*+/=?^_`{|}~-@example.com", "UPPER@EXAMPLE.COM", "_@x-y.example", "1@2.example"],
    *["a@example.c", "a@3com.com", "a@1.2.example", "-@example.com", "a--b@example.com"],
    # Local parts of other scripts, with marks: Hindi, also with a composed nukta; Thai; Tamil;
    # Bengali; vowelled Arabic, with the shadda typed first; Hebrew; Vietnamese; decomposed Latin.
    *["\u092e\u0941\u0915\u0947\u0936@example.com", "\u0915\u093c\u0932\u092e@example.com"],
    *["\u0958\u0932\u092e@example.com", "\u0939\u093f\u0928\u094d\u0926\u0940.1@example.com"],
    *["\u0e1c\u0e39\u0e49\u0e43\u0e0a\u0e49@example.com", "\u0e19\u0e49\u0e33@example.com"],
    *["\u0baa\u0baf\u0ba9\u0bb0\u0bcd@example.com", "\u09ac\u09be\u0982\u09b2\u09be@example.com"],
    *["\u0645\u064f\u062d\u064e\u0645\u0651\u064e\u062f@example.com", "\u05e9\u05b8\u05c1@x.com"],
    *["nguy\u1ec5n@example.com", "nguye\u0302\u0303n@example.com", "\u00fcber@example.com"],
    *["\u6d4b\u8bd5@example.com", "\U0001f600@example.com", "\u5c71\u7530\u30fc@example.com"],
    # ZWJ and ZWNJ where the script needs them: Sinhala, Persian.
    *["\u0dc1\u0dca\u200d\u0dbb\u0dd3@example.com", "\u0645\u06cc\u200c\u062e\u0648@example.com"],
    # Domains in Unicode and in ASCII, in upper case and decomposed.
    *["a@b\u00fccher.example", "a@xn--bcher-kva.example", "a@XN--BCHER-KVA.example"],
    *["a@B\u00dcCHER.example", "a@bu\u0308cher.example", "a@xn--bcher-kva.b\u00fccher.example"],
    *["a@\u0395\u039b\u039b\u0391\u03a3.gr", "a@\u03b5\u03bb\u03bb\u03b1\u03c2.gr"],
    *["a@\u0909\u0926\u093e\u0939\u0930\u0923.\u092d\u093e\u0930\u0924", "a@fa\u00df.example"],
    *[
        "a@\u0e15\u0e31\u0e27\u0e2d\u0e22\u0e48\u0e32\u0e07.\u0e44\u0e17\u0e22",
        "a@\u05d0\u05d1.com",
    ],
    *["a@\u0645\u062b\u0627\u0644.\u0625\u062e\u062a\u0628\u0627\u0631", "a@\u30c4.life"],
    # Cherokee, which UTS 46 maps to its capitals: in both cases, and mixed.
    *["a@\u13e3\u13b3\u13a9.com", "a@\uabb3\uab83\uab79.com", "a@\u13e3\uab83\u13f8.com"],
    # Special-use names.
    *["a@x.test", "a@x.example", "a@x.local", "a@x.invalid", "a@x.localhost", "a@x.onion"],
    *["a@example.net", "a@1.0.0.127.in-addr.arpa", "a@x.internal", "a@home.arpa"],
    # Quoted local parts.
    *['"john doe"@example.com', '"quoted.local"@example.com', '"a..b"@example.com', '"."@x.com'],
    *['"\u091c\u0949\u0928 \u0921\u094b"@example.com', '"it\'s a+b"@example.com'],
]

# Valid with ALLOW_LOCAL_ADDRESSES=on only.
LOCAL = [
    *[
        "user@[IPv6:2001:db8::1]",
        "user@[ipv6:::1]",
        "user@[IPv6:::ffff:192.0.2.7]",
        "a@[10.0.0.12]",
    ],
    *["user@[192.0.2.7]", "postmaster@localhost", "a@mail-1", "a@b\u00fccher", "a@test", "a@3com"],
    *["a@0xg", "a@x0", "a@0x-a"],
    *['"john doe"@localhost', "a@xn--bcher-kva"],
]

INVALID = [
    *[
        "someone",
        "example.com",
        "@",
        "@example.com",
        "someone@",
        "a@b@example.com",
        "a@@example.com",
    ],
    *["some one@example.com", " a@example.com", "a@example.com ", "a@exam ple.com"],
    *["a\u00a0b@example.com", "a@example\u2028.com", "a@example.com\u3000"],
    *[".a@example.com", "a.@example.com", "a..b@example.com", "a(b)@example.com"],
    *["a@.example.com", "a@example..com", "a@example.com.", "a@example.com..", "a@."],
    *["a@-example.com", "a@example-.com", "a@example.com-", "a@example.-com", "a@ab--cd.com"],
    *[
        "a@exam_ple.com",
        f"a@{'b' * 64}.com",
        "a@exa\U0001f600mple.com",
        "a@xn--a.com",
        "a@xn--.com",
    ],
    *["+15551234567", "a@example.com/b", "a@example.com?x=y", "a@example.com:25", "a@exa!mple.com"],
    # Lists, names, comments, URLs.
    *["a@example.com,b@example.com", "a@example.com;b@example.com", "a@example.com b@example.com"],
    *["a,b@example.com", "a;b@example.com", "a:b@example.com", "team:a@example.com;"],
    *["A <a@example.com>", "<a@example.com>", "mailto:a@example.com", '"A" <a@example.com>'],
    *[
        "a@example.com (A)",
        "a(b)@example.com",
        "a@(b)example.com",
        "a@example.com\\",
        "a\\@x@y.com",
    ],
    # IP addresses without brackets, and malformed literals.
    *["a@10.0.0.12", "a@127.1", "a@2130706433", "a@192.0.2.7:25", "a@1.2.3.4.5", "a@0x7f.0.0.1"],
    *["a@0x7f.0.0.0xa", "a@127.0.0.0xa", "a@127.0.0.0XA", "a@x.0x", "a@example.0x1", "a@x.1"],
    *["a@0x7f", "a@0xa", "a@0X", "a@0", "a@\u0967\u0968", "a@x.\u0967\u0968"],
    *["a@2001:db8::1", "a@[300.0.0.1]", "a@[192.0.2]", "a@[example.com]", "a@[]", "a@[", "a@]"],
    *["a@[IPv6:fe80::1%eth0]", "a@[IPv6:192.0.2.7]", "a@[::1]", "a@[192.0.2.7", "a@x[192.0.2.7]"],
    *["a@[192.0.2.7].com", "a@[192.0.2.7]\\", "a@[x:y]", "a@[010.0.0.1]"],
    # Look-alikes of the delimiters.
    *["a@x\uff20y.com", "a\uff20x.com", "a\uff20y@x.com", "a\ufe6by@x.com", "a@x\ufe6by.com"],
    *[
        "a\uff0cb@x.com",
        "a\uff1bb@x.com",
        "a\u037eb@x.com",
        "a\uff1cb\uff1e@x.com",
        "a\u2024@x.com",
    ],
    *[
        "a@example\u3002com",
        "a@example\uff0ecom",
        "a@\uff45xample.com",
        "a@\u2460.com",
        "a@\u2488com",
    ],
    *["a@\uff11\uff10.0.0.12", "\uff02a b\uff02@x.com", "a\u00b4b@x.com"],
    # Invisible, unassigned and private characters, unpaired surrogates, leading combining marks.
    *["a\u200bb@x.com", "a\u00adb@x.com", "a\ufeff@x.com", "a\u2060b@x.com", "a\u200eb@x.com"],
    *["a\u202eb@x.com", "a\u2066b@x.com", "a\u3164b@x.com", "a\u115fb@x.com", "a\uffa0b@x.com"],
    *["a\u034fb@x.com", "a\ufe0fb@x.com", "a\u2800b@x.com", "a\U000e0041b@x.com", "a\u200db@x.com"],
    *["a\u200cb@x.com", "\u200d@x.com", "a\u0378b@x.com", "a\ue000b@x.com", "a\uffffb@x.com"],
    *["\u0301a@x.com", '"\u0301a"@x.com', "a@\u0301x.com", "a@x.\u0301com", "a\u2028b@x.com"],
    *[
        "a\ue000\u200db@x.com",
        "\U00017000\u200cb@x.com",
        "a@exa\u00admple.com",
        "a@exa\u200bmple.com",
        "a@exa\ufe0fmple.com",
        "a@exa\u034fmple.com",
    ],
    *["a@exa\u3164mple.com", "a@exa\u202emple.com", "a@exa\u0378mple.com", "a@exa\ue000mple.com"],
    # IDNA 2008: joiners in a domain (the library's rule), and the rule for right-to-left names.
    *["a@\u0dc1\u0dca\u200d\u0dbb\u0dd3.com", "a@1.\u05d0\u05d1.com", "a@\u05d0a.com"],
    *["a@\u0661a.com", "a@" + "\u00fc" * 60 + ".com", "a@\u2665.com", "a@xn--i-7iq.com"],
    *["a@\u017fhop.com", "a@\ufb01sh.com", "a@x\uff61com"],
    # IDNA 2008 disallows the Kelvin, Angstrom and Ohm signs, Greek oxia, and CJK compatibility
    # ideographs, each of which NFC replaces; and SARA AM (Thai, Lao), which UTS 46 maps.
    *[
        "a@\u212a.com",
        "a@x\u212b.com",
        "a@\u2126.com",
        "a@x.\u212aom",
        "a@\u1f71.gr",
        "a@\u1fbb.gr",
    ],
    *["a@\uf900.com", "a@\U0002f800.com", "a@e\u0340.com", "a@x\u0e33.com", "a@\u0e99\u0eb3.com"],
    # Quoted local parts that somebody may take for several addresses, or for none.
    *['"a,b"@x.com', '"a;b"@x.com', '"a@b"@x.com', '"a<b>"@x.com', '"a:b"@x.com', '"a(b)"@x.com'],
    *[r'"a\"b"@x.com', r'"a\\b"@x.com', r'"a\ b"@x.com', '"a[b]"@x.com', '"a\uff0cb"@x.com'],
    *['""@x.com', '" "@x.com', '" a"@x.com', '"a "@x.com', '"a  b"@x.com', '"a\u00a0b"@x.com'],
    *['"a@example.com', 'a"@x.com', '"@x.com', '"a"b@x.com', 'a"b"@x.com', '"a"."b"@x.com'],
    *['"a@x.com,"@y.com', '"a@x.com, b"@y.com', '"a\u2028b"@x.com', '"a\u200bb"@x.com'],
]
