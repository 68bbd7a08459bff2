"""Damage that passes the first checks: files are unpacked, damaged inside, and packed again."""

import io
import json
import struct
import zipfile

NUMBERS = [b"0", b"-1", b"1e999", b"NaN", b"-0.0", b"1e-320", b"1e308", b"9" * 20, b"9" * 400, b"9" * 5000]
INTEGERS = [0, 1, 2, 3, 7, 8, 127, 128, 255, 256, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1]
TOKENS = [
    *(b"\0", b"\n", b"\r", b"\r\n", b'"', b"'", b"\\", b",", b": ", b" ", b"\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80"),
    *(b"\x1b[31m", b"<script>", b"[bold]", b"../../x", b"__proto__", b"\xe2\x80\xae", b"NaN", b"null", b"true"),
    *(b"'|O'", b"'<f8'", b"'S0'", b"'V1000000000'", b"(1000000000000,)", b"(-1,)", b"(", b"[" * 50, b'{"a":' * 50),
    *(b"PK\1\2", b"PK\3\4", b"PK\5\6", b"\x93NUMPY\1\0", b"7f800000", b"ffffffff", b"00000000"),
]
VALUES = [
    *(
        None,
        True,
        False,
        0,
        -1,
        3,
        255,
        4001,
        2**31,
        2**53,
        2**63 - 1,
        2**63,
        10**30,
        10**400,
        0.5,
        -0.0,
        1e308,
        1e-320,
    ),
    *(float("nan"), float("inf"), "", "x", "\x1b[2J", "<b>", "\ud800", "max", "*", "A" * 5000, [], [1], ["a", 1], {}),
    *({"a": {}}, [[[[]]]], "entropy", "fixed", [0] * 40, {"*": {"threshold": 1e300}}, {"*": {"num_bits": 16}}),
]


def mutate(data, random, others=()):
    """Return `data` with one to four kinds of damage, chosen by the `random.Random`."""
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        kinds = [_bytes, _bytes, _number, _token, _integer]
        if data[:2] == b"PK":
            kinds += [_members] * 40
        if data.lstrip()[:1] in (b"{", b"["):
            kinds += [_json] * 15
        if others:
            kinds += [lambda data, random: _splice(data, random.choice(others), random)]
        data = random.choice(kinds)(data, random)
    return data


def _span(data, random):
    begin = random.randrange(len(data) + 1)
    return begin, min(len(data), begin + random.choice((1, 1, 2, 4, 16, random.randrange(1, 200))))


def _bytes(data, random):
    begin, end = _span(data, random)
    new = random.choice((b"", random.randbytes(end - begin), data[begin:end] * 2, data[begin:end][::-1]))
    return data[:begin] + new + data[end:] if random.random() < 0.95 else data[:begin]


def _token(data, random):
    begin, end = _span(data, random)
    return data[:begin] + random.choice(TOKENS) + data[random.choice((begin, end)) :]


def _integer(data, random):
    form = random.choice(["<B", "<H", "<I", "<Q", ">I", ">Q"])
    size, begin = struct.calcsize(form), random.randrange(len(data) + 1)
    value = random.choice(INTEGERS) % 256**size
    return data[:begin] + struct.pack(form, value) + data[begin + size :]


def _number(data, random):
    """Replace a run of ASCII digits."""
    begin = end = random.randrange(len(data) + 1)
    while begin and data[begin - 1 : begin] in b"0123456789.":
        begin -= 1
    while end < len(data) and data[end : end + 1] in b"0123456789.":
        end += 1
    return data[:begin] + random.choice(NUMBERS) + data[end:]


def _splice(data, other, random):
    return data[: _span(data, random)[0]] + other[_span(other, random)[0] :]


def _json(data, random):
    """Damage one node of a JSON document. Data that are not valid JSON are returned unchanged."""
    try:
        document = json.loads(data)
        holders = [document := [document]]
        for holder in holders:
            items = holder.values() if isinstance(holder, dict) else holder
            holders += [item for item in items if isinstance(item, dict | list) and item]
        _damage(random.choice(holders), random)
        return json.dumps(document[0]).encode() if document else b""
    except (ValueError, RecursionError):
        return data


def _damage(holder, random):
    key = random.choice(list(holder)) if isinstance(holder, dict) else random.randrange(len(holder))
    kind = random.randrange(4)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[str(random.choice(VALUES))] = holder.pop(key)
    elif kind == 2 and isinstance(holder, list):
        holder.append(random.choice(holder))
    else:
        holder[key] = random.choice(VALUES)


def _members(data, random):
    """Damage one member of a zip file, or the list of members."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {info.filename: archive.read(info) for info in archive.infolist() if info.file_size < 2**20}
    except Exception:  # damaged already
        return data
    if not members:
        return data
    name = random.choice([*members, *["meta.npy"] * (4 if "meta.npy" in members else 0)])
    kind = random.randrange(12)
    if kind == 0:
        del members[name]
    elif kind == 1:
        members[random.choice(["meta.npy", "hist_0.npy", "../x.npy", "a", "x\n.npy"])] = members.pop(name)
    elif kind == 2:
        members[name] = members[random.choice(list(members))]
    else:
        members[name] = _npy(members[name], random)
    buffer = io.BytesIO()
    method = random.choice([zipfile.ZIP_STORED] * 20 + [zipfile.ZIP_DEFLATED] * 10 + [zipfile.ZIP_BZIP2])
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content, compress_type=method)
    return buffer.getvalue()


def _npy(content, random):
    """Damage the header or the numbers of an array. JSON in it becomes other JSON, with a header of that length."""
    length = 10 + int.from_bytes(content[8:10], "little")
    header, body = content[10:length], content[length:]
    if body[:1] == b"{":
        body = _json(body, random) if random.random() < 0.9 else random.choice((_bytes, _number, _token))(body, random)
        header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (%d,), }\n" % len(body)
    elif random.random() < 0.2:
        header = random.choice((_bytes, _number, _token))(header, random)
    else:
        body = random.choice((_bytes, _integer, _integer))(body, random)
    return content[:8] + struct.pack("<H", len(header) % 2**16) + header + body
