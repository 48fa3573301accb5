package virtfleet

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestAddresses(t *testing.T) {
	for address, wanted := range map[string]endpoint{
		"tls://fleet.example:7443":                   {target: "fleet.example:7443", secure: true},
		"fleet.example:7443":                         {target: "fleet.example:7443", secure: true},
		"tls://[::1]:7443?server_name=fleet.example": {target: "[::1]:7443", secure: true, serverName: "fleet.example"},
		"unix:///run/virtfleet/admin.sock":           {target: "unix:///run/virtfleet/admin.sock"},
		"ssh://me@n1/run/x.sock":                     {proxied: "ssh://me@n1/run/x.sock"},
		"ssh://me@n1?to=g:7443&server_name=g":        {proxied: "ssh://me@n1?to=g:7443&server_name=g", secure: true, serverName: "g"},
		"command:nc?arg=-U&arg=/run/x.sock":          {proxied: "command:nc?arg=-U&arg=/run/x.sock"},
	} {
		if found, err := parseAddress(address); err != nil || found != wanted {
			t.Errorf("%s: %+v, %v", address, found, err)
		}
	}
	for _, address := range []string{
		"", "fleet.example", "tls://fleet.example", "tls://:7443", "tls://fleet.example:7443/path", "unix://relative", "unix:///",
		"https://fleet.example", "tls://a b:1", "tls://h:99999999x",
	} {
		if found, err := parseAddress(address); err == nil || !strings.Contains(err.Error(), "no address") {
			t.Errorf("%q is taken as %+v, %v", address, found, err)
		}
	}
}

func writeContexts(t *testing.T, contexts any) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "contexts.json")
	text, err := json.Marshal(contexts)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, text, 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("VIRTFLEET_CONTEXTS_FILE", path)
	for _, name := range []string{"ADDRESS", "CA_FILE", "CERT_FILE", "KEY_FILE", "CONTEXT"} {
		t.Setenv("VIRTFLEET_"+name, "")
	}
	return path
}

func TestTheFleetIsFoundInOrder(t *testing.T) {
	path := writeContexts(t, map[string]any{
		"current": "lab",
		"later":   "a key of a later release",
		"contexts": map[string]any{
			"lab":   map[string]string{"address": "lab:1", "ca_file": "lab/ca.crt", "cert_file": "/etc/me.crt", "later": "x"},
			"other": map[string]string{"address": "unix:///run/x"},
			"empty": map[string]string{},
		},
	})
	found, err := findContext()
	if err != nil || found.Address != "lab:1" || found.CAFile != filepath.Join(filepath.Dir(path), "lab/ca.crt") ||
		found.CertFile != "/etc/me.crt" || found.KeyFile != "" {
		t.Errorf("%+v, %v", found, err)
	}
	t.Setenv("VIRTFLEET_CONTEXT", "other")
	if found, err := findContext(); err != nil || found.Address != "unix:///run/x" {
		t.Errorf("%+v, %v", found, err)
	}
	t.Setenv("VIRTFLEET_ADDRESS", "here:2")
	t.Setenv("VIRTFLEET_CA_FILE", "/ca")
	if found, err := findContext(); err != nil || found.Address != "here:2" || found.CAFile != "/ca" {
		t.Errorf("%+v, %v", found, err)
	}
	if found, err := (&dialPlan{context: "other"}).find(); err != nil || found.Address != "unix:///run/x" {
		t.Errorf("%+v, %v", found, err)
	}
	for name, why := range map[string]string{"nowhere": `has no context "nowhere"`, "empty": "has no address"} {
		if _, err := Dial(t.Context(), WithContext(name)); err == nil || !strings.Contains(err.Error(), why) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestNoFleet(t *testing.T) {
	path := writeContexts(t, map[string]any{})
	if _, err := Dial(t.Context()); err == nil || !strings.Contains(err.Error(), "VIRTFLEET_ADDRESS") {
		t.Error(err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if _, err := Dial(t.Context()); err == nil || !strings.Contains(err.Error(), "VIRTFLEET_ADDRESS") {
		t.Error(err)
	}
	if err := os.WriteFile(path, []byte(`{"contexts": `), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Dial(t.Context()); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("a broken file: %v", err)
	}
	t.Setenv("VIRTFLEET_CONTEXTS_FILE", "")
	t.Setenv("XDG_CONFIG_HOME", "/somewhere")
	if found, err := ContextsFile(); err != nil || found != "/somewhere/virtfleet/contexts.json" {
		t.Error(found, err)
	}
	t.Setenv("XDG_CONFIG_HOME", "")
	t.Setenv("HOME", "/mine")
	if found, err := ContextsFile(); err != nil || found != "/mine/.config/virtfleet/contexts.json" {
		t.Error(found, err)
	}
}

func TestTLSNeedsItsFiles(t *testing.T) {
	writeContexts(t, map[string]any{})
	if _, err := Dial(t.Context(), WithAddress("h:1")); err == nil || !strings.Contains(err.Error(), "VIRTFLEET_CA_FILE") {
		t.Error(err)
	}
	missing := Credentials{CAFile: "/nowhere/ca", CertFile: "/nowhere/crt", KeyFile: "/nowhere/key"}
	if _, err := Dial(t.Context(), WithAddress("h:1"), WithCredentials(missing)); err == nil || !strings.Contains(err.Error(), "/nowhere/ca") {
		t.Error(err)
	}
}
