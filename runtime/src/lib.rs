//! The engine format, its loader and executor. Knows neither passes nor LLVM.
