//! A plan's tree in a form that can be edited: nodes with lists of children, which are put in depth-first order at the end.

use std::collections::BTreeSet;

use crate::{
    plan::{Level, Node, NodeId, NodeIndex, NodeKind, Plan},
    plugin::RollbackScope,
};

/// A node that is, or will be, one of the plan's.
struct Item {
    id: NodeId,
    level: Level,
    name: String,
    rollback: RollbackScope,
    kind: NodeKind,
    parent: Option<usize>,
    children: Vec<usize>,
}

/// The tree. Items of the original plan stand at their indices.
pub(super) struct Tree {
    items: Vec<Item>,
    /// The next id to be given.
    next_id: NodeId,
}

impl Tree {
    pub(super) fn of(plan: &Plan) -> Self {
        let mut items: Vec<Item> = (0..)
            .zip(&plan.nodes)
            .map(|(index, node)| Item {
                id: plan.id_of(index),
                level: node.level,
                name: node.name.clone(),
                rollback: node.rollback,
                kind: node.kind.clone(),
                parent: node.parent.map(|parent| parent as usize),
                children: Vec::new(),
            })
            .collect();
        for index in 1..items.len() {
            if let Some(parent) = items[index].parent {
                items[parent].children.push(index);
            }
        }
        let highest = items.iter().map(|item| item.id).max();
        let next_id = plan
            .next_id
            .max(highest.map_or(0, |highest| highest.saturating_add(1)));
        Self { items, next_id }
    }

    /// A new node below another, as its last child.
    pub(super) fn add(&mut self, parent: usize, level: Level, name: &str, kind: NodeKind) -> usize {
        let index = self.items.len();
        self.items.push(Item {
            id: self.next_id,
            level,
            name: name.to_owned(),
            rollback: RollbackScope::Order,
            kind,
            parent: Some(parent),
            children: Vec::new(),
        });
        self.next_id = self.next_id.saturating_add(1);
        self.items[parent].children.push(index);
        index
    }

    /// What can be rolled back once a node has begun.
    pub(super) fn roll_back_as(&mut self, item: usize, rollback: RollbackScope) {
        self.items[item].rollback = rollback;
    }

    /// A name that no group below a node has: people tell groups by their names.
    pub(super) fn name_below(&self, item: usize, wanted: &str) -> String {
        let mut taken = BTreeSet::new();
        let mut open = vec![item];
        while let Some(item) = open.pop() {
            let item = &self.items[item];
            if item.level == Level::Group {
                taken.insert(item.name.as_str());
            }
            open.extend(&item.children);
        }
        let others = (2..).map(|count: u32| format!("{wanted} ({count})"));
        std::iter::once(wanted.to_owned())
            .chain(others)
            .find(|name| !taken.contains(name.as_str()))
            .unwrap_or_else(|| wanted.to_owned())
    }

    /// Puts a node in front of one of its siblings.
    pub(super) fn put_before(&mut self, item: usize, sibling: usize) {
        self.detach(item);
        let Some(parent) = self.items[sibling].parent else {
            return;
        };
        let children = &mut self.items[parent].children;
        let at = children.iter().position(|child| *child == sibling);
        children.insert(at.unwrap_or(children.len()), item);
        self.items[item].parent = Some(parent);
    }

    fn detach(&mut self, item: usize) -> Option<usize> {
        let parent = self.items[item].parent.take()?;
        self.items[parent].children.retain(|child| *child != item);
        Some(parent)
    }

    /// Takes a subtree out, and what is empty without it.
    pub(super) fn remove(&mut self, item: usize) {
        let mut at = self.detach(item);
        while let Some(parent) = at {
            if parent == 0 || !self.items[parent].children.is_empty() {
                return;
            }
            at = self.detach(parent);
        }
    }

    /// Moves a subtree below another node, as its last child.
    pub(super) fn move_to(&mut self, item: usize, parent: usize) {
        self.remove(item);
        self.items[item].parent = Some(parent);
        self.items[parent].children.push(item);
    }

    /// Takes away everything between the root and some nodes: they are to be placed anew.
    pub(super) fn uproot(&mut self, kept: &[usize]) {
        for item in kept {
            self.detach(*item);
        }
        self.items[0].children.clear();
    }

    /// Places a node that was uprooted.
    pub(super) fn place(&mut self, item: usize, parent: usize) {
        self.items[item].parent = Some(parent);
        self.items[parent].children.push(item);
    }

    /// Whether a server's turn stands below an item.
    pub(super) fn has_units(&self, item: usize) -> bool {
        let mut open = vec![item];
        while let Some(item) = open.pop() {
            if matches!(self.items[item].kind, NodeKind::Unit { .. }) {
                return true;
            }
            open.extend(&self.items[item].children);
        }
        false
    }

    /// The nodes in depth-first order, and the next id to be given.
    pub(super) fn flatten(mut self) -> (Vec<Node>, NodeId) {
        let mut nodes: Vec<Node> = Vec::with_capacity(self.items.len());
        let mut open: Vec<(usize, Option<NodeIndex>)> = vec![(0, None)];
        while let Some((at, parent)) = open.pop() {
            let index = NodeIndex::try_from(nodes.len()).unwrap_or(NodeIndex::MAX);
            let item = &mut self.items[at];
            nodes.push(Node {
                id: (item.id != index).then_some(item.id),
                parent,
                level: item.level,
                name: std::mem::take(&mut item.name),
                rollback: item.rollback,
                kind: item.kind.clone(),
            });
            open.extend(
                item.children
                    .iter()
                    .rev()
                    .map(|child| (*child, Some(index))),
            );
        }
        (nodes, self.next_id)
    }
}
