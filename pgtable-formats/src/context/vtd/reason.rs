//! Fault reasons: what a VT-d unit records when a request does not pass.

use core::fmt;

use crate::FaultClass;

/// A fault reason, 8 bits. `Display` prints the number as `0x71`; [`describe`](Self::describe) has words.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct FaultReason(pub u8);

macro_rules! reasons {
    ($($name:ident = $code:literal, $class:ident, $text:literal;)*) => {
        impl FaultReason {
            $(#[doc = concat!("Reason ", stringify!($code), ": ", $text, ".")] pub const $name: Self = Self($code);)*

            /// Every reason that has a name here, in the order of numbers.
            pub const ALL: &[Self] = &[$(Self::$name),*];

            /// What the number means, in a few words.
            pub const fn describe(self) -> &'static str {
                match self.0 {
                    $($code => $text,)*
                    _ => "unknown fault reason",
                }
            }

            /// What the reason means, in neutral words.
            pub const fn class(self) -> FaultClass {
                match self.0 {
                    $($code => FaultClass::$class,)*
                    _ => FaultClass::Configuration,
                }
            }
        }
    };
}

reasons! {
    TRANSLATION_TYPE = 0x31, Configuration, "the translation table mode is legacy for a request with a PASID";
    PAGE_REQUEST_TYPE = 0x32, Configuration, "the translation table mode is legacy for a page request";
    ROOT_ACCESS = 0x38, TableAccess, "root entry not accessible";
    ROOT_NOT_PRESENT = 0x39, Configuration, "root entry not present";
    ROOT_RESERVED = 0x3a, Malformed, "reserved bits set in the root entry";
    CONTEXT_ACCESS = 0x40, TableAccess, "context entry not accessible";
    CONTEXT_NOT_PRESENT = 0x41, Configuration, "context entry not present";
    CONTEXT_RESERVED = 0x42, Malformed, "reserved bits set in the context entry";
    CONTEXT_INVALID = 0x43, Configuration, "invalid context entry";
    ATS_DISABLED = 0x44, Configuration, "device TLB not enabled in the context entry";
    PASID_DISABLED = 0x45, Configuration, "PASID not enabled in the context entry";
    PASID_RANGE = 0x46, Configuration, "PASID larger than the directory covers";
    PAGE_REQUEST_DISABLED = 0x47, Configuration, "page requests not enabled in the context entry";
    UNTAGGED_RANGE = 0x48, Configuration, "PASID of untagged requests larger than the directory covers";
    DIRECTORY_ACCESS = 0x50, TableAccess, "PASID directory entry not accessible";
    DIRECTORY_NOT_PRESENT = 0x51, Configuration, "PASID directory entry not present";
    DIRECTORY_RESERVED = 0x52, Malformed, "reserved bits set in the PASID directory entry";
    ENTRY_ACCESS = 0x58, TableAccess, "PASID entry not accessible";
    ENTRY_NOT_PRESENT = 0x59, Configuration, "PASID entry not present";
    ENTRY_RESERVED = 0x5a, Malformed, "reserved bits set in the PASID entry";
    ENTRY_INVALID = 0x5b, Configuration, "invalid PASID entry";
    EXECUTE_DISABLED = 0x5c, Permission, "execute request where the PASID entry does not enable them";
    PRIVILEGED_DISABLED = 0x5d, Permission, "privileged request where the PASID entry does not enable them";
    TABLE_ACCESS = 0x70, TableAccess, "first-stage entry not accessible";
    NOT_PRESENT = 0x71, NotMapped, "first-stage entry not present";
    RESERVED = 0x72, Malformed, "reserved bits set in a first-stage entry";
    ROOT_TABLE_ACCESS = 0x73, TableAccess, "first-stage root table not accessible";
    NOT_CANONICAL = 0x80, NotMapped, "address not canonical";
    USER_DENIED = 0x81, Permission, "unprivileged request for a privileged page";
    EXECUTE_DENIED = 0x82, Permission, "execute request for a page that is not executable";
    INPUT_LIMIT = 0x83, NotMapped, "address beyond the first stage's hardware limit";
    SECOND_STAGE_LIMIT = 0x84, NotMapped, "address beyond the second stage's hardware limit";
    WRITE_DENIED = 0x85, Permission, "write request for a page that is not writable";
    READ_DENIED = 0x86, Permission, "read request for a page that is not readable";
    INTERRUPT_RANGE = 0x87, Malformed, "output in the interrupt address range";
    ENTRY_UPDATE = 0x90, TableAccess, "flags of a first-stage entry could not be updated: not snooped";
    ENTRY_UPDATE_FAILED = 0x91, TableAccess, "flags of a first-stage entry could not be updated";
}

impl FaultReason {
    /// Whether FPD of a PASID directory entry or a PASID entry keeps the fault from being recorded: it arises from such
    /// an entry or from what it leads to, and the entry itself could be read.
    pub const fn is_qualified(self) -> bool {
        self.0 >= Self::DIRECTORY_NOT_PRESENT.0 && self.0 != Self::ENTRY_ACCESS.0
    }
}

impl fmt::Display for FaultReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#04x}", self.0)
    }
}

impl fmt::Debug for FaultReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FaultReason({self})")
    }
}
