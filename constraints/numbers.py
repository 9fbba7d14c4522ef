"""Numbers between bounds, as regular expressions over their digits."""

from __future__ import annotations

from decimal import Decimal

INTEGER_DIGITS = 18
"""Of an integer without bounds: what 64 bits hold."""

DIGITS = 15
"""Of other numbers, before and behind the point together: so many tell any two apart as float64."""

_OVER = "(?![0-9.eE])"  # the number ends here


def integer(least: int | None, most: int | None) -> str | None:
    """Return the integers between two bounds, inclusive, without leading zeros and −0; None for none."""
    largest = max(10**INTEGER_DIGITS - 1, 10 * abs(least or 0), 10 * abs(most or 0))
    low, high = -largest if least is None else least, largest if most is None else most
    if low > high:
        return None
    if least is None and most is None:
        return f"(?:0|-?[1-9][0-9]{{0,{INTEGER_DIGITS - 1}}})"
    parts = []
    if low < 0:
        parts += [f"-{one}" for one in _natural(max(1, -high), -low)]
    if high >= 0:
        parts += _natural(max(0, low), high)
    return f"(?:{'|'.join(parts)})"


def number(least: Decimal | None, most: Decimal | None, above: bool = False, below: bool = False) -> str | None:
    """Return the numbers between two bounds, None where there are none.

    With a bound, numbers are written without exponent, and in no more digits than keep float64 on its side of it.

    Args:
        above, below: the bound itself is left out.
    """
    if least is None and most is None:
        whole = f"-?(?:0|[1-9][0-9]{{0,{DIGITS - 1}}})"
        return rf"(?:{whole}(?:\.[0-9]{{1,{DIGITS}}})?(?:[eE][+-]?[0-9]{{1,2}})?)"
    if least is not None and most is not None and (least > most or (least == most and (above or below))):
        return None
    length = max(len(str(abs(int(one)))) for one in (least, most) if one is not None)
    after = max([1, DIGITS - length, *(_behind(one) for one in (least, most) if one is not None)])
    before = length + 1 if least is None or most is None else length
    form = _Form(before, after)
    low = None if least is None else form.at_least(least, above)
    high = None if most is None else form.at_most(most, below)
    if low is None or high is None:
        return low or high
    return f"(?:(?={low}{_OVER}){high}{_OVER})"


def _behind(bound: Decimal) -> int:
    return max(0, -int(bound.as_tuple().exponent)) + 1


class _Form:
    """Numbers of so many digits before and behind the point."""

    def __init__(self, before: int, after: int) -> None:
        self.before, self.after = before, after

    def at_least(self, bound: Decimal, strict: bool) -> str:
        if bound >= 0:
            return self._from(bound, strict)
        return f"(?:{self._from(Decimal(0), False)}|-(?=[0.]*[1-9]){self._to(-bound, strict)})"  # without −0

    def at_most(self, bound: Decimal, strict: bool) -> str:
        if bound < 0:
            return f"-{self._from(-bound, strict)}"
        small = f"|{self._to(bound, strict)}" if bound or not strict else ""
        return f"(?:-(?:{self._from(Decimal(0), True)}){small})"

    def _from(self, bound: Decimal, strict: bool) -> str:
        """Numbers without sign from a bound on, which is not negative."""
        whole, fraction = _parts(bound)
        parts = [rf"{one}(?:\.{self._any()})?" for one in _natural(whole + 1, 10**self.before - 1)]
        if fraction or strict:
            parts.append(rf"{whole}\.{self._fraction_from(fraction, strict, self.after)}")
        else:
            parts.append(rf"{whole}(?:\.{self._any()})?")
        return f"(?:{'|'.join(parts)})"

    def _to(self, bound: Decimal, strict: bool) -> str:
        """Numbers without sign up to a bound, which is not negative."""
        whole, fraction = _parts(bound)
        parts = [rf"{one}(?:\.{self._any()})?" for one in _natural(0, whole - 1)]
        if fraction:
            parts.append(rf"{whole}(?:\.{self._fraction_to(fraction, strict, self.after)})?")
        elif not strict:
            parts.append(str(whole))
        return f"(?:{'|'.join(parts) or '(?!)'})"

    def _any(self) -> str:
        return f"[0-9]{{1,{self.after}}}"

    def _fraction_from(self, digits: str, strict: bool, left: int) -> str:
        """Digits behind the point of at least `digits`, which ends in no zero."""
        if not digits:
            return f"(?=0*[1-9])[0-9]{{1,{left}}}" if strict else f"[0-9]{{0,{left}}}"
        first = int(digits[0])
        parts = [f"{first}{self._fraction_from(digits[1:], strict, left - 1)}"]
        if first < 9:
            parts.append(f"[{first + 1}-9][0-9]{{0,{left - 1}}}")
        return f"(?:{'|'.join(parts)})"

    def _fraction_to(self, digits: str, strict: bool, left: int) -> str:
        """Digits behind the point of at most `digits`, which is not empty and ends in no zero."""
        first, rest = int(digits[0]), digits[1:]
        parts = [f"[0-{first - 1}][0-9]{{0,{left - 1}}}"] if first else []
        if rest:
            parts.append(f"{first}(?:{self._fraction_to(rest, strict, left - 1)})?")
        elif not strict:
            parts.append(str(first))
        return f"(?:{'|'.join(parts) or '(?!)'})"


def _parts(bound: Decimal) -> tuple[int, str]:
    whole = int(bound)
    return whole, format(bound - whole, "f").partition(".")[2].rstrip("0")


def _natural(low: int, high: int) -> list[str]:
    """Return alternatives for the integers from low to high, neither negative."""
    found = []
    while low <= high:
        top = min(high, 10 ** len(str(low)) - 1)
        found.append(_digits(str(low), str(top)))
        low = top + 1
    return found


def _digits(low: str, high: str) -> str:
    """Strings of digits between two of one length."""
    if low == high:
        return low
    if low[0] == high[0]:
        return low[0] + _digits(low[1:], high[1:])
    rest = len(low) - 1
    first, last, parts = int(low[0]), int(high[0]), []
    if low[1:].strip("0"):
        parts.append(low[0] + _digits(low[1:], "9" * rest))
        first += 1
    if high[1:].strip("9"):
        parts.append(high[0] + _digits("0" * rest, high[1:]))
        last -= 1
    if first <= last:
        parts.append((f"[{first}-{last}]" if first < last else str(first)) + (f"[0-9]{{{rest}}}" if rest else ""))
    return parts[0] if len(parts) == 1 else f"(?:{'|'.join(parts)})"
