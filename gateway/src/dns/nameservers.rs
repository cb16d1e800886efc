//! The nameservers that clients' queries go to, and what is known of them.

use std::{cell::RefCell, net::SocketAddr, rc::Rc, time::Instant};

use super::rtt::Table;

/// Nameservers and their numbers. A query keeps the set that it started with.
#[derive(Debug)]
pub struct Set {
    /// In configured order.
    pub servers: Vec<SocketAddr>,
    /// By index into `servers`.
    pub table: RefCell<Table>,
}

impl Set {
    /// Nothing is known of `servers` yet.
    pub fn new(servers: Vec<SocketAddr>) -> Rc<Self> {
        let table = RefCell::new(Table::new(servers.len(), Instant::now()));
        Rc::new(Self { servers, table })
    }
}
