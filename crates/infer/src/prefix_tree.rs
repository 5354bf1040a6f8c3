//! Texts laid out so that what several begin with is there once.

/// A text of which some tokens are scored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ScoredText<'a> {
    /// All tokens.
    pub tokens: &'a [u32],
    /// The first token that is scored; every one after it is, too. The first token of a text cannot be: nothing stands
    /// before it.
    pub first: usize,
}

impl<'a> ScoredText<'a> {
    /// What the model reads: all but the last token.
    pub(crate) fn inputs(&self) -> &'a [u32] {
        &self.tokens[..self.tokens.len().saturating_sub(1)]
    }
}

/// Tokens that all texts of a branch have in common, after those of the nodes before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Node {
    pub(crate) before: Option<usize>,
    /// A text that passes through it, and where in its tokens the node begins and ends.
    pub(crate) text: usize,
    pub(crate) first: usize,
    pub(crate) end: usize,
    /// Nodes that follow.
    pub(crate) branches: usize,
    /// Tokens that are scored after one of the node's: their text and place in it, ascending by place.
    pub(crate) scored: Vec<(usize, usize)>,
}

/// The nodes of `texts`, each after the one before it.
pub(crate) fn prefix_tree(texts: &[ScoredText<'_>]) -> Vec<Node> {
    let inputs = |text: usize| texts[text].inputs();
    let mut order: Vec<usize> = (0..texts.len()).collect();
    // Neighbours in this order share the most, and what others begin with comes first.
    order.sort_by_key(|&text| inputs(text));
    let mut nodes: Vec<Node> = Vec::new();
    // Texts that share their first tokens, how many, and the node that ends there.
    let mut open: Vec<(&[usize], usize, Option<usize>)> = vec![(&order, 0, None)];
    while let Some((texts_here, depth, before)) = open.pop() {
        let ended = texts_here.partition_point(|&text| inputs(text).len() <= depth);
        let same = |&a: &usize, &b: &usize| inputs(a)[depth] == inputs(b)[depth];
        for branch in texts_here[ended..].chunk_by(same) {
            let (text, last) = (branch[0], branch[branch.len() - 1]);
            let end = inputs(text).iter().zip(inputs(last)).take_while(|(a, b)| a == b).count();
            let scored = |&text: &usize| {
                let places = texts[text].first.max(depth + 1)..(end + 1).min(texts[text].tokens.len());
                places.map(move |place| (text, place))
            };
            let mut scored: Vec<(usize, usize)> = branch.iter().flat_map(scored).collect();
            scored.sort_by_key(|&(_, place)| place);
            if let Some(before) = before {
                nodes[before].branches += 1;
            }
            open.push((branch, end, Some(nodes.len())));
            nodes.push(Node { before, text, first: depth, end, branches: 0, scored });
        }
    }
    nodes
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_beginning_is_there_once(
            texts in proptest::collection::vec((proptest::collection::vec(0_u32..3, 2..9), 1_usize..9), 1..12),
        ) {
            let texts: Vec<ScoredText<'_>> = texts
                .iter()
                .map(|(tokens, first)| ScoredText { tokens, first: (*first).min(tokens.len() - 1) })
                .collect();
            let nodes = prefix_tree(&texts);
            let beginnings: HashSet<&[u32]> =
                texts.iter().flat_map(|text| (1..=text.inputs().len()).map(|end| &text.tokens[..end])).collect();
            prop_assert_eq!(nodes.iter().map(|node| node.end - node.first).sum::<usize>(), beginnings.len());
            let mut scored = HashSet::new();
            for (index, node) in nodes.iter().enumerate() {
                prop_assert!(node.first < node.end);
                prop_assert_eq!(node.branches, nodes.iter().filter(|other| other.before == Some(index)).count());
                match node.before {
                    Some(before) => {
                        prop_assert!(before < index && nodes[before].end == node.first);
                        let common = &texts[nodes[before].text].tokens[..node.first];
                        prop_assert_eq!(&texts[node.text].tokens[..node.first], common);
                    }
                    None => prop_assert_eq!(node.first, 0),
                }
                for &(text, place) in &node.scored {
                    prop_assert!(node.first < place && place <= node.end);
                    prop_assert_eq!(&texts[text].tokens[..place], &texts[node.text].tokens[..place]);
                    prop_assert!(scored.insert((text, place)), "scored once");
                }
            }
            let wanted = texts.iter().enumerate();
            let wanted: HashSet<(usize, usize)> =
                wanted.flat_map(|(text, of)| (of.first..of.tokens.len()).map(move |place| (text, place))).collect();
            prop_assert_eq!(scored, wanted);
        }
    }
}
