//! Engines of the bundled model, for the GPU and for processors: both give the same perplexity, nearly. And what else the
//! machine has to compare with.

use quantc::ir::diag::{Diag, Result};
use std::path::Path;
use std::process::Command;

/// How far perplexities may lie apart, relatively.
const APART: f64 = 5e-3;

/// Compares the engines `NAME.gpu` with those called `NAME.cpu` in the folder.
pub fn compare(folder: &Path) -> Result<bool> {
    let listed = std::fs::read_dir(folder).map_err(|e| crate::system(folder, &e))?;
    let mut names: Vec<String> = listed
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.strip_suffix(".gpu").map(str::to_owned))
        .collect();
    names.sort();
    println!("## Engines\n");
    if names.is_empty() {
        println!("There are no engines in the folder.\n");
        return Ok(true);
    }
    println!("| engine | perplexity on the GPU | on a processor | |\n|---|---|---|---|");
    let mut right = true;
    for name in names {
        let of = |kind: &str| perplexity(folder, &format!("{name}.{kind}"));
        let line = match (of("gpu"), of("cpu")) {
            (Ok(gpu), Ok(cpu)) => {
                let same = (gpu / cpu - 1.0).abs() <= APART;
                right &= same;
                format!("{gpu:.4} | {cpu:.4} | {}", if same { "right" } else { "**wrong**" })
            }
            (Err(diag), _) | (_, Err(diag)) => {
                right = false;
                format!("{} | | **wrong**", diag.to_string().replace('\n', " "))
            }
        };
        println!("| {name} | {line} |");
    }
    println!();
    Ok(right)
}

fn perplexity(folder: &Path, engine: &str) -> Result<f64> {
    let out = Command::new(folder.join("quantc"))
        .arg("eval")
        .arg(folder.join(engine))
        .arg("--text")
        .arg(folder.join("tales_eval.txt"))
        .args(["--max-tokens", "8176", "--json"])
        .output()
        .map_err(|e| crate::system(&folder.join("quantc"), &e))?;
    let text = String::from_utf8_lossy(&out.stdout);
    let value: serde_json::Value = serde_json::from_str(&text)
        .map_err(|_| Diag::system(String::from_utf8_lossy(&out.stderr).trim().to_owned()))?;
    value["perplexity"].as_f64().ok_or_else(|| Diag::bug("`quantc eval` gives no perplexity"))
}

/// What PyTorch says of the same products in bf16, where there is one.
const TORCH: &str = "
import torch, time
assert torch.cuda.is_available()
print('| matrix | tokens | us |\\n|---|---|---|')
for n, k in [(6144, 4096), (14336, 4096), (8192, 8192), (28672, 8192)]:
    w = [torch.zeros(n, k, device='cuda', dtype=torch.bfloat16) for _ in range(8)]
    for m in [1, 8, 64, 512, 4096]:
        x = torch.zeros(m, k, device='cuda', dtype=torch.bfloat16)
        for y in w: torch.nn.functional.linear(x, y)
        torch.cuda.synchronize(); t = time.perf_counter()
        for _ in range(5):
            for y in w: torch.nn.functional.linear(x, y)
        torch.cuda.synchronize()
        print(f'| {n} x {k} | {m} | {(time.perf_counter() - t) / 40 * 1e6:.1f} |')
";

/// Prints what PyTorch reaches.
pub fn beside() {
    println!("## PyTorch beside\n");
    match Command::new("python3").args(["-c", TORCH]).output() {
        Ok(out) if out.status.success() => println!("{}", String::from_utf8_lossy(&out.stdout)),
        _ => println!("There is no PyTorch with CUDA on this machine.\n"),
    }
}
