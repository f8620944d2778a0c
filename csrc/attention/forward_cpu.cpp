namespace tw::TW_ISA {}
