//! Kubernetes quantities: `500m`, `0.5`, `64Mi`, `1e3`. Exact, no floating point.

/// Why text is no quantity.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum QuantityError {
    /// Not of the form.
    #[error("not a quantity; valid: a number with an optional suffix such as 500m, 2, 1.5, 64Mi, 4Gi")]
    Form,
    /// Below zero.
    #[error("below zero; valid: 0 or more")]
    Negative,
    /// Does not fit.
    #[error("too large")]
    TooLarge,
}

/// A quantity in thousandths, rounded up: the vCPU quantity `250m` is 250.
///
/// # Errors
/// Not a quantity, or out of range.
pub fn parse_milli(text: &str) -> Result<u32, QuantityError> {
    let milli = parse(text, 1000)?;
    u32::try_from(milli).map_err(|_| QuantityError::TooLarge)
}

/// A quantity in whole units, rounded up: the memory quantity `1Ki` is 1024.
///
/// # Errors
/// Not a quantity, or out of range.
pub fn parse_units(text: &str) -> Result<u64, QuantityError> {
    let units = parse(text, 1)?;
    u64::try_from(units).map_err(|_| QuantityError::TooLarge)
}

/// `text` times `scale`, rounded up.
fn parse(text: &str, scale: u128) -> Result<u128, QuantityError> {
    if text.len() > 64 {
        return Err(QuantityError::TooLarge);
    }
    let (negative, text) = match text.as_bytes().first() {
        Some(b'-') => (true, &text[1..]),
        Some(b'+') => (false, &text[1..]),
        _ => (false, text),
    };
    let number_end = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, suffix) = text.split_at(number_end);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if (whole.is_empty() && fraction.is_empty()) || fraction.contains('.') {
        return Err(QuantityError::Form);
    }
    let (multiplier, exponent) = suffix_value(suffix)?;
    // value = digits * multiplier * scale * 10^(exponent - number of fraction digits)
    let digits = format!("{whole}{fraction}");
    let digits = digits.trim_start_matches('0');
    if digits.is_empty() {
        return Ok(0);
    }
    if negative {
        return Err(QuantityError::Negative);
    }
    let fraction_digits = i32::try_from(fraction.len()).map_err(|_| QuantityError::TooLarge)?;
    let mut digits = digits;
    let mut exponent = exponent - fraction_digits;
    // Keeps the arithmetic below in range; what is dropped still rounds up.
    let mut dropped = 0;
    while exponent < -30 && digits.len() > 1 {
        if !digits.ends_with('0') {
            dropped = 1;
        }
        digits = &digits[..digits.len() - 1];
        exponent += 1;
    }
    let digits: u128 = digits.parse().map_err(|_| QuantityError::TooLarge)?;
    let value = digits
        .checked_mul(multiplier)
        .and_then(|value| value.checked_mul(scale))
        .and_then(|value| value.checked_add(dropped))
        .ok_or(QuantityError::TooLarge)?;
    let power = 10_u128.checked_pow(exponent.unsigned_abs());
    if exponent >= 0 {
        let power = power.ok_or(QuantityError::TooLarge)?;
        value.checked_mul(power).ok_or(QuantityError::TooLarge)
    } else {
        Ok(power.map_or(1, |power| value.div_ceil(power)))
    }
}

/// Binary multiplier and decimal exponent of a suffix.
fn suffix_value(suffix: &str) -> Result<(u128, i32), QuantityError> {
    Ok(match suffix {
        "" => (1, 0),
        "n" => (1, -9),
        "u" => (1, -6),
        "m" => (1, -3),
        "k" => (1, 3),
        "M" => (1, 6),
        "G" => (1, 9),
        "T" => (1, 12),
        "P" => (1, 15),
        "E" => (1, 18),
        "Ki" => (1 << 10, 0),
        "Mi" => (1 << 20, 0),
        "Gi" => (1 << 30, 0),
        "Ti" => (1 << 40, 0),
        "Pi" => (1 << 50, 0),
        "Ei" => (1 << 60, 0),
        _ => {
            let exponent = suffix
                .strip_prefix(['e', 'E'])
                .and_then(|exponent| exponent.parse::<i32>().ok())
                .ok_or(QuantityError::Form)?;
            if !(-30..=30).contains(&exponent) {
                return Err(QuantityError::TooLarge);
            }
            (1, exponent)
        }
    })
}

/// Bytes in the largest binary unit that divides them: `64Mi`.
pub fn bytes_text(bytes: u64) -> String {
    for (shift, unit) in [(40, "Ti"), (30, "Gi"), (20, "Mi"), (10, "Ki")] {
        if bytes != 0 && bytes.is_multiple_of(1 << shift) {
            return format!("{}{unit}", bytes >> shift);
        }
    }
    bytes.to_string()
}

/// Thousandths in short form: `2`, `250m`.
pub fn milli_text(milli: u32) -> String {
    if milli.is_multiple_of(1000) {
        (milli / 1000).to_string()
    } else {
        format!("{milli}m")
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn known_values() {
        for (text, milli) in [
            ("1", 1000),
            ("250m", 250),
            ("0.25", 250),
            (".5", 500),
            ("2.", 2000),
            ("1e1", 10_000),
            ("1500u", 2),
            ("1n", 1),
            ("0", 0),
            ("+1", 1000),
            ("0.0000000000000000000000000000000000000000001", 1),
        ] {
            assert_eq!(parse_milli(text), Ok(milli), "{text}");
        }
        for (text, units) in [
            ("64Mi", 64 << 20),
            ("1.5Gi", 3 << 29),
            ("1G", 1_000_000_000),
            ("100m", 1),
            ("128974848", 128_974_848),
        ] {
            assert_eq!(parse_units(text), Ok(units), "{text}");
        }
    }

    #[test]
    fn wrong_values() {
        for text in ["", "x", "1x", "1.2.3", "Mi", "1mi", "1 Gi", ".", "1e", "--1"] {
            assert_eq!(parse_units(text), Err(QuantityError::Form), "{text}");
        }
        assert_eq!(parse_units("-1"), Err(QuantityError::Negative));
        assert_eq!(parse_units("-0"), Ok(0));
        assert_eq!(parse_units("99999999999999999999"), Err(QuantityError::TooLarge));
        assert_eq!(parse_milli("5000000"), Err(QuantityError::TooLarge));
        assert_eq!(parse_units("1e99"), Err(QuantityError::TooLarge));
    }

    proptest! {
        #[test]
        fn any_text_is_answered(text in "[-+0-9.eEkKMGTPimnu ]{0,70}") {
            let _ = parse_milli(&text);
            let _ = parse_units(&text);
        }

        #[test]
        fn printed_bytes_read_back(bytes in any::<u64>()) {
            prop_assert_eq!(parse_units(&bytes_text(bytes)), Ok(bytes));
        }

        #[test]
        fn printed_milli_read_back(milli in any::<u32>()) {
            prop_assert_eq!(parse_milli(&milli_text(milli)), Ok(milli));
        }
    }
}
