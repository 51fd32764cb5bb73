//! Lists that are short in every snapshot of ours. A structure of KVM takes one byte in a file and thousands in memory when
//! it ends early there, so the length of the file alone bounds nothing.

use std::fmt;
use std::marker::PhantomData;

use serde::de::{Deserialize, Deserializer, Error, SeqAccess, Visitor};

/// Reads a list of at most `MAX` items.
///
/// # Errors
/// Those of the items, and one more item.
pub(super) fn deserialize<'de, D, T, const MAX: usize>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    deserializer.deserialize_seq(ShortList::<T, MAX>(PhantomData))
}

struct ShortList<T, const MAX: usize>(PhantomData<T>);

impl<'de, T: Deserialize<'de>, const MAX: usize> Visitor<'de> for ShortList<T, MAX> {
    type Value = Vec<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "at most {MAX} items")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<T>, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = seq.next_element()? {
            if items.len() == MAX {
                return Err(A::Error::invalid_length(MAX + 1, &self));
            }
            items.push(item);
        }
        Ok(items)
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    #[derive(Debug, PartialEq, Eq, Deserialize)]
    struct Holder {
        #[serde(deserialize_with = "super::deserialize::<_, _, 3>")]
        items: Vec<u8>,
        after: u8,
    }

    #[test]
    fn a_list_is_read_up_to_its_limit() {
        let holder = |items: &[u8]| {
            let mut bytes = postcard::to_allocvec(items).unwrap();
            bytes.push(7);
            postcard::from_bytes::<Holder>(&bytes)
        };
        for items in [vec![], vec![1], vec![1, 2, 3]] {
            assert_eq!(holder(&items), Ok(Holder { items, after: 7 }));
        }
        assert!(holder(&[1, 2, 3, 4]).is_err());
    }
}
