//! Statistics of a model in a file, to be used in place of a text.
//!
//! A file is a line that names the format, the length of a head in 8 bytes, the head as JSON, the states that it lists, one behind
//! the other, and the digest of all of that. It says of which layers it is, each under a digest of program and weights; of which
//! samples of which text; and on what they were run. Layers are those of the float model.
//!
//! What holds: files of disjoint samples of one text merge to the bytes of one run over all of them, in any order.

use super::stats::{SiteStats, bytes};
use quantc_ir::diag::{Diag, Result};
use quantc_ir::weights::Digest;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// The first line.
const FORMAT: &[u8] = b"quantc statistics 1\n";

/// Bytes of the digest at the end.
const DIGEST: usize = 32;

/// What a file says of itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Head {
    /// The model's name.
    pub model: String,
    /// Where the text comes from, for people.
    pub data: String,
    /// Digest of the text's tokens.
    pub text: String,
    /// What layers were run with.
    pub exec: String,
    /// Tokens of a sample.
    pub length: usize,
    /// What shuffled the samples; 0 when they are in the order of the text.
    pub seed: u64,
    /// The samples seen, by their place among all, with a digest of their tokens.
    pub samples: Vec<(usize, String)>,
    /// The statistics, as `calibrate` calls them.
    pub statistics: Vec<String>,
    /// The layers in the order of the model.
    pub layers: Vec<LayerHead>,
}

/// A layer of a file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerHead {
    /// Its name.
    pub name: String,
    /// Digest of its program and weights.
    pub key: String,
    /// Whether its products read rows of bf16.
    pub bf16: bool,
    /// The values looked at.
    pub sites: Vec<SiteHead>,
}

/// A value of a layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SiteHead {
    /// Whether it goes into a cache; otherwise products read it.
    pub cache: bool,
    /// Its place among the values of that kind.
    pub place: usize,
    /// Numbers of a row.
    pub columns: usize,
    /// Rows seen.
    pub tokens: u64,
    /// Names and lengths of its states.
    pub states: Vec<(String, usize)>,
}

/// A file of statistics.
#[derive(Clone, Debug, PartialEq)]
pub struct StatsFile {
    /// Where it lies, for errors.
    place: String,
    head: Head,
    /// The states of all sites, in order.
    states: Vec<Vec<u8>>,
    digest: Digest,
}

impl StatsFile {
    /// Of states in the order in which the head lists them.
    pub fn new(head: Head, states: Vec<Vec<u8>>) -> Result<StatsFile> {
        let mut file = StatsFile { place: String::new(), head, states, digest: Digest::of(&[]) };
        file.digest = Digest::of(&file.body()?);
        Ok(file)
    }

    /// What it says of itself.
    pub fn head(&self) -> &Head {
        &self.head
    }

    /// Where it lies.
    pub fn place(&self) -> &str {
        &self.place
    }

    /// A name for its contents.
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// The file in bytes.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let mut out = self.body()?;
        out.extend(self.digest.0);
        Ok(out)
    }

    fn body(&self) -> Result<Vec<u8>> {
        let head =
            serde_json::to_vec(&self.head).map_err(|e| Diag::bug(format!("the head of statistics: {e}")))?;
        let mut out = FORMAT.to_vec();
        out.extend((head.len() as u64).to_le_bytes());
        out.extend(head);
        self.states.iter().for_each(|state| out.extend(state));
        Ok(out)
    }

    /// Reads a file.
    pub fn read(path: &Path) -> Result<StatsFile> {
        let place = path.display().to_string();
        let bytes =
            std::fs::read(path).map_err(|e| Diag::input(format!("cannot read it: {e}")).in_file(&place))?;
        StatsFile::from_bytes(&bytes, &place)
    }

    /// The reverse of [`to_bytes`](Self::to_bytes), for bytes that may be anything.
    pub fn from_bytes(all: &[u8], place: &str) -> Result<StatsFile> {
        let refuse = |why: &str| {
            Diag::input(format!("this is no file of statistics: {why}"))
                .in_file(place)
                .help("`quantc calibrate MODEL --data TEXT -o FILE` writes one")
        };
        let (body, digest) = all
            .len()
            .checked_sub(DIGEST)
            .map(|at| all.split_at(at))
            .ok_or_else(|| refuse("it is too short"))?;
        let rest = body.strip_prefix(FORMAT).ok_or_else(|| refuse("it begins in another way"))?;
        if Digest::of(body).0 != digest {
            return Err(refuse("it is damaged or not whole"));
        }
        let (len, rest) = rest.split_first_chunk().ok_or_else(|| refuse("it ends early"))?;
        let len = usize::try_from(u64::from_le_bytes(*len)).unwrap_or(usize::MAX);
        let (head, mut rest) = rest.split_at_checked(len).ok_or_else(|| refuse("its head ends early"))?;
        let head: Head = serde_json::from_slice(head).map_err(|e| refuse(&format!("its head: {e}")))?;
        let mut states = vec![];
        for (_, len) in head.layers.iter().flat_map(|l| &l.sites).flat_map(|s| &s.states) {
            let (state, after) =
                rest.split_at_checked(*len).ok_or_else(|| refuse("a statistic ends early"))?;
            states.push(state.to_vec());
            rest = after;
        }
        if !rest.is_empty() {
            return Err(refuse("it goes on after its end"));
        }
        Ok(StatsFile { place: place.into(), head, states, digest: Digest::of(body) })
    }

    /// The layer `name` of `model`, whose program and weights are `key` now.
    pub fn layer(&self, model: &str, name: &str, key: Digest) -> Result<usize> {
        let stale = |why: String| {
            Diag::input(format!("these statistics are stale: {why}")).in_file(&self.place).help(
                "write them again with `quantc calibrate`, for this model and with the passes in front of `calibrate` as \
                 `--before`; or give the text with `--data`",
            )
        };
        if self.head.model != model {
            return Err(stale(format!("they are of the model {}, and this is {model}", self.head.model)));
        }
        let found = self.head.layers.iter().position(|layer| layer.name == name);
        let found = found.ok_or_else(|| stale(format!("they are of a model without a layer @{name}")))?;
        match self.head.layers[found].key == key.to_string() {
            true => Ok(found),
            false => Err(stale(format!("the program or weights of @{name} were others"))),
        }
    }

    /// What is known of a value of a layer.
    pub fn site(&self, layer: usize, site: usize) -> Result<SiteStats> {
        let before = |sites: &[SiteHead]| sites.iter().map(|s| s.states.len()).sum::<usize>();
        let at = self.head.layers[..layer].iter().map(|l| before(&l.sites)).sum::<usize>();
        let sites = &self.head.layers[layer].sites;
        let (at, head) = (at + before(&sites[..site]), &sites[site]);
        let names = head.states.iter().map(|(name, _)| name.as_str());
        let states: Vec<(&str, &[u8])> = names.zip(self.states[at..].iter().map(Vec::as_slice)).collect();
        SiteStats::from_states(head.tokens, head.columns, &states).map_err(|e| e.in_file(&self.place))
    }

    /// One file for what two have seen. Refused unless they are of the same layers and of other samples of the same text.
    pub fn merge(self, other: StatsFile) -> Result<StatsFile> {
        let (a, b) = (&self.head, &other.head);
        let refuse = |why: String| {
            let both = format!("{} and {} cannot be merged: {why}", self.place, other.place);
            Diag::input(both).help("merge files that `quantc calibrate` wrote with the same options but `--first` and `--samples`")
        };
        let same = [
            ("models", a.model == b.model),
            ("texts", a.text == b.text),
            ("lengths of samples", a.length == b.length),
            ("seeds", a.seed == b.seed),
            ("kinds of execution", a.exec == b.exec),
            ("statistics", a.statistics == b.statistics),
        ];
        if let Some((what, _)) = same.iter().find(|(_, same)| !same) {
            return Err(refuse(format!("they are of different {what}")));
        }
        let shape = |head: &Head| -> Vec<_> {
            let site = |s: &SiteHead| (s.cache, s.place, s.columns, names(s));
            let layer = |l: &LayerHead| (l.key.clone(), l.bf16, l.sites.iter().map(site).collect::<Vec<_>>());
            head.layers.iter().map(layer).collect()
        };
        if shape(a) != shape(b) {
            return Err(refuse("they are of different layers".into()));
        }
        let mut head = a.clone();
        head.samples.extend(b.samples.iter().cloned());
        head.samples.sort();
        if let Some(twice) = head.samples.windows(2).find(|pair| pair[0].0 == pair[1].0) {
            return Err(refuse(format!("both have seen sample {}", twice[0].0)));
        }
        let mut states = vec![];
        let mut pairs = self.states.iter().zip(&other.states);
        let theirs = b.layers.iter().flat_map(|l| &l.sites);
        for (site, their) in head.layers.iter_mut().flat_map(|l| &mut l.sites).zip(theirs) {
            let tokens = site.tokens.checked_add(their.tokens);
            site.tokens = tokens.ok_or_else(|| refuse("more than 2^64 tokens were counted".into()))?;
            for ((name, len), (a, b)) in site.states.iter_mut().zip(&mut pairs) {
                let state = bytes::merged(name, a, b)?;
                *len = state.len();
                states.push(state);
            }
        }
        StatsFile::new(head, states)
    }
}

fn names(site: &SiteHead) -> Vec<String> {
    site.states.iter().map(|(name, _)| name.clone()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(states: Vec<(String, usize)>) -> Head {
        let sites = vec![SiteHead { cache: false, place: 0, columns: 2, tokens: 3, states }];
        let key = Digest::of(b"layer").to_string();
        Head {
            model: "m".into(),
            data: "text".into(),
            text: "1".into(),
            exec: "reference".into(),
            length: 3,
            seed: 0,
            samples: vec![(4, "2".into())],
            statistics: vec!["absmax".into()],
            layers: vec![LayerHead { name: "l0".into(), key, bf16: false, sites }],
        }
    }

    fn absmax() -> Vec<u8> {
        [1.5f32, 0.25].iter().flat_map(|x| x.to_le_bytes()).collect()
    }

    #[test]
    fn files_read_back() {
        let file = StatsFile::new(head(vec![("absmax".into(), 8)]), vec![absmax()]).unwrap();
        let bytes = file.to_bytes().unwrap();
        let again = StatsFile::from_bytes(&bytes, "").unwrap();
        assert_eq!(again, file);
        let layer = again.layer("m", "l0", Digest::of(b"layer")).unwrap();
        let stats = again.site(layer, 0).unwrap();
        assert_eq!((stats.absmax, stats.tokens), (vec![1.5, 0.25], 3));
        for (model, name, key) in [("n", "l0", "layer"), ("m", "l1", "layer"), ("m", "l0", "other")] {
            let stale = again.layer(model, name, Digest::of(key.as_bytes())).unwrap_err();
            assert!(stale.to_string().contains("stale"), "{stale}");
        }
    }

    /// Whoever writes the digest as well can say anything.
    #[test]
    fn heads_that_lie_are_refused() {
        let huge = vec![("absmax".to_string(), usize::MAX)];
        for states in [huge, vec![("absmax".into(), 9)], vec![("absmax".into(), 7)]] {
            let file = StatsFile::new(head(states), vec![absmax()]).unwrap();
            let refused = StatsFile::from_bytes(&file.to_bytes().unwrap(), "lies.qcal").unwrap_err();
            assert!(refused.to_string().contains("no file of statistics"), "{refused}");
        }
        for (name, state) in [
            ("absmax", vec![0, 0, 0xc0, 0x7f, 0, 0, 0, 0]),
            ("absmax", vec![0; 12]),
            ("histogram", absmax()),
            ("hessian", vec![0xff; 16]),
            ("rows", absmax()),
            ("mean", absmax()),
        ] {
            let file = StatsFile::new(head(vec![(name.into(), state.len())]), vec![state]).unwrap();
            let file = StatsFile::from_bytes(&file.to_bytes().unwrap(), "lies.qcal").unwrap();
            assert!(file.site(0, 0).is_err(), "{name}");
        }
        let mut bytes = b"quantc statistics 1\n".to_vec();
        bytes.extend(u64::MAX.to_le_bytes());
        let digest = Digest::of(&bytes);
        bytes.extend(digest.0);
        assert!(StatsFile::from_bytes(&bytes, "").is_err());
    }
}
