//! Tests of expansion: what hostile plugins return is refused, and what is accepted becomes the same plan every time.

mod built;
mod refused;
