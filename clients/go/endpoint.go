package virtfleet

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"strings"
)

// Credentials names the files that mutual TLS needs, PEM all of them.
type Credentials struct {
	// CAFile holds the certificates of the fleet's authority.
	CAFile string `json:"ca_file,omitempty"`
	// CertFile holds the certificate of the caller, as `virtfleet authority issue` writes it.
	CertFile string `json:"cert_file,omitempty"`
	// KeyFile holds its private key.
	KeyFile string `json:"key_file,omitempty"`
}

// Context is one fleet of the context file: where it is, and who one is there.
type Context struct {
	// Address is tls://HOST:PORT, HOST:PORT, unix:///PATH, or what `virtfleet proxy` understands.
	Address string `json:"address"`
	Credentials
}

// Contexts is the context file, which all clients of virtfleet share.
type Contexts struct {
	// Current is the name of the context that is used when none is named.
	Current string `json:"current"`
	// Contexts holds the contexts by name.
	Contexts map[string]Context `json:"contexts"`
}

// ContextsFile returns where the context file is: VIRTFLEET_CONTEXTS_FILE, or virtfleet/contexts.json in the user's folder for
// settings (XDG_CONFIG_HOME, else ~/.config).
func ContextsFile() (string, error) {
	if path := os.Getenv("VIRTFLEET_CONTEXTS_FILE"); path != "" {
		return path, nil
	}
	folder := os.Getenv("XDG_CONFIG_HOME")
	if folder == "" {
		home, err := os.UserHomeDir()
		if err != nil {
			return "", err
		}
		folder = filepath.Join(home, ".config")
	}
	return filepath.Join(folder, "virtfleet", "contexts.json"), nil
}

// ReadContexts reads a context file; one that is missing has no contexts. Paths in it are made absolute.
func ReadContexts(path string) (*Contexts, error) {
	content, err := readSmall(path)
	if errors.Is(err, fs.ErrNotExist) {
		return &Contexts{}, nil
	}
	if err != nil {
		return nil, err
	}
	found := &Contexts{}
	if err := json.Unmarshal(content, found); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	for name, one := range found.Contexts {
		for _, file := range []*string{&one.CAFile, &one.CertFile, &one.KeyFile} {
			if *file != "" && !filepath.IsAbs(*file) {
				*file = filepath.Join(filepath.Dir(path), *file)
			}
		}
		found.Contexts[name] = one
	}
	return found, nil
}

func namedContext(name string) (Context, error) {
	path, err := ContextsFile()
	if err != nil {
		return Context{}, err
	}
	contexts, err := ReadContexts(path)
	if err != nil {
		return Context{}, err
	}
	if name == "" {
		name = contexts.Current
	}
	if name == "" {
		return Context{}, fmt.Errorf("no fleet: set VIRTFLEET_ADDRESS, or name a context of %s in VIRTFLEET_CONTEXT", path)
	}
	found, known := contexts.Contexts[name]
	if !known {
		return Context{}, fmt.Errorf("%s has no context %q", path, name)
	}
	if found.Address == "" {
		return Context{}, fmt.Errorf("%s: context %q has no address", path, name)
	}
	return found, nil
}

// findContext returns the fleet that the environment or the context file names.
func findContext() (Context, error) {
	if address := os.Getenv("VIRTFLEET_ADDRESS"); address != "" {
		return Context{Address: address, Credentials: environmentCredentials()}, nil
	}
	return namedContext(os.Getenv("VIRTFLEET_CONTEXT"))
}

func environmentCredentials() Credentials {
	return Credentials{
		CAFile:   os.Getenv("VIRTFLEET_CA_FILE"),
		CertFile: os.Getenv("VIRTFLEET_CERT_FILE"),
		KeyFile:  os.Getenv("VIRTFLEET_KEY_FILE"),
	}
}

// endpoint is an address, understood.
type endpoint struct {
	target     string // what gRPC connects to; empty: a proxy gives the socket
	proxied    string // the address that the proxy is asked for
	secure     bool
	serverName string // the name that the server's certificate must have; empty: the host's
}

func parseAddress(address string) (endpoint, error) {
	text := address
	if !strings.Contains(text, ":") || !strings.Contains(text, "://") && !strings.HasPrefix(text, "command:") {
		text = "tls://" + text
	}
	wrong := func(why string) (endpoint, error) {
		return endpoint{}, fmt.Errorf("%q is no address of virtfleet: %s", address, why)
	}
	uri, err := url.Parse(text)
	if err != nil {
		return wrong(err.Error())
	}
	serverName := uri.Query().Get("server_name")
	switch uri.Scheme {
	case "tls":
		if uri.Hostname() == "" || uri.Port() == "" || uri.Path != "" {
			return wrong("write tls://HOST:PORT")
		}
		return endpoint{target: uri.Host, secure: true, serverName: serverName}, nil
	case "unix":
		if uri.Host != "" || !filepath.IsAbs(uri.Path) || filepath.Clean(uri.Path) == "/" {
			return wrong("write unix:///PATH")
		}
		return endpoint{target: "unix://" + uri.Path}, nil
	case "http", "https", "tcp", "grpc", "grpcs", "dns":
		return wrong("write tls://HOST:PORT, unix:///PATH, ssh://HOST/PATH or command:PROGRAM")
	}
	return endpoint{proxied: address, secure: serverName != "", serverName: serverName}, nil
}
