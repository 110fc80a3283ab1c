//! Medians, spreads, means.

/// The median; `None` of nothing.
#[must_use]
pub fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        odd if odd % 2 == 1 => Some(sorted[middle]),
        _ => Some(f64::midpoint(sorted[middle - 1], sorted[middle])),
    }
}

/// From the smallest to the largest, in percent of the median; `None` for fewer than two values.
#[must_use]
pub fn spread_percent(values: &[f64]) -> Option<f64> {
    let median = median(values)?;
    let (low, high) = values.iter().fold((f64::MAX, f64::MIN), |(low, high), &x| (x.min(low), x.max(high)));
    (values.len() > 1 && median > 0.0).then(|| (high - low) / median * 100.0)
}

/// The geometric mean of positive values; `None` of nothing.
#[must_use]
pub fn geometric_mean(values: &[f64]) -> Option<f64> {
    let logarithms: Vec<f64> = values.iter().filter(|x| **x > 0.0).map(|x| x.ln()).collect();
    (!logarithms.is_empty()).then(|| (logarithms.iter().sum::<f64>() / logarithms.len() as f64).exp())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_of_odd_and_even_counts() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
    }

    #[test]
    fn spread_is_the_range_by_the_median() {
        assert_eq!(spread_percent(&[7.0]), None);
        assert_eq!(spread_percent(&[9.0, 10.0, 12.0]), Some(30.0));
        assert_eq!(spread_percent(&[0.0, 0.0]), None);
    }

    #[test]
    fn geometric_mean_of_ratios() {
        assert_eq!(geometric_mean(&[]), None);
        assert!((geometric_mean(&[1.0, 100.0]).unwrap() - 10.0).abs() < 1e-9);
    }
}
