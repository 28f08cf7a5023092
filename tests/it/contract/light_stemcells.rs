//! Light stemcells: the operator's image is the one that create_stemcell has verified.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use crate::support::host::{Host, text};

fn light(host: &Host, image: &Path) -> String {
    let digest = Command::new("sha256sum").arg(image).output().unwrap();
    let digest = String::from_utf8(digest.stdout).unwrap()[..64].to_owned();
    let properties = json!({"image_path": image, "sha256": digest});
    text(&host.ok("create_stemcell", &json!(["/nonexistent", properties])))
}

#[test]
fn image_that_was_replaced_rewritten_or_cut_is_refused_and_audited() {
    let Some(host) = Host::new() else { return };
    host.stemcell();
    let (image, kept) = (host.path("light"), host.path("kept"));
    fs::copy(host.path("image"), &image).unwrap();
    fs::copy(&image, &kept).unwrap();
    let stemcell = light(&host, &image);
    let vm = host.vm(&stemcell);
    host.wait_for_console(&vm, "BOOTSECTOR-OK", 1);
    let qemu = host.qemu(&vm).unwrap().pid();
    let content = fs::read(&kept).unwrap();
    let changed = || {
        let mut changed = content.clone();
        *changed.last_mut().unwrap() ^= 1;
        changed
    };
    let changes: [&dyn Fn(); 3] = [
        &|| {
            fs::write(host.path("new"), changed()).unwrap();
            fs::rename(host.path("new"), &image).unwrap();
        },
        &|| fs::write(&image, changed()).unwrap(),
        &|| fs::write(&image, &content[..content.len() / 2]).unwrap(),
    ];
    for change in changes {
        change();
        for (method, arguments) in
            [("create_vm", host.vm_arguments(&stemcell)), ("reboot_vm", json!([vm]))]
        {
            let answer = host.call(method, &arguments);
            let refused = answer.failure();
            assert!(refused.message.contains(image.to_str().unwrap()), "{method}: {refused:?}");
        }
        assert_eq!(host.qemu(&vm).unwrap().pid(), qemu, "the VM keeps running");
        let findings = host.command(&["audit", "--json"]).1.to_string();
        assert!(findings.contains("is not the verified one any more"), "{findings}");
        // Another file with the same content.
        fs::remove_file(&image).unwrap();
        fs::copy(&kept, &image).unwrap();
        let findings = host.command(&["audit", "--json"]).1.to_string();
        assert!(!findings.contains("is not the verified one any more"), "{findings}");
    }
    host.ok("reboot_vm", &json!([vm]));
    host.wait_for_console(&vm, "BOOTSECTOR-OK", 2);
}

#[test]
fn records_without_the_attributes_of_the_image_keep_working() {
    let Some(host) = Host::new() else { return };
    host.stemcell();
    let stemcell = light(&host, &host.path("image"));
    let vm = host.vm(&stemcell);
    host.wait_for_console(&vm, "BOOTSECTOR-OK", 1);
    for path in
        [format!("state/stemcells/{stemcell}/stemcell.json"), format!("state/vms/{vm}/vm.json")]
    {
        let path = host.path(&path);
        let mut record: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        let holder = if record.get("base").is_some() { &mut record["base"] } else { &mut record };
        holder.as_object_mut().unwrap().remove("verified").expect("a new record has them");
        fs::write(&path, record.to_string()).unwrap();
    }
    host.ok("reboot_vm", &json!([vm]));
    host.wait_for_console(&vm, "BOOTSECTOR-OK", 2);
    host.vm(&stemcell);
}
