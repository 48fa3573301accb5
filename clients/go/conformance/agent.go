package main

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"

	"cloud.google.com/go/longrunning/autogen/longrunningpb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/fieldmaskpb"

	virtfleet "virtfleet.dev/go"
	computev1 "virtfleet.dev/go/compute/v1"
	storagev1 "virtfleet.dev/go/storage/v1"
	typev1 "virtfleet.dev/go/type/v1"
)

const chunkBytes = 256 << 10

// agent does what it is told with one client at a time.
type agent struct {
	mutex  sync.Mutex
	client *virtfleet.Client
	end    context.CancelFunc
	ctx    context.Context // what runs in the background ends with the client

	watches   map[string]*watched
	informers map[string]*informed
	consoles  map[string]*console
}

func newAgent() *agent { return &agent{ctx: context.Background(), end: func() {}} }

// do answers one request.
func (a *agent) do(asked *request) (any, error) {
	ctx := a.context()
	if asked.DeadlineS > 0 && asked.Do != "informer" {
		limited, cancel := context.WithTimeout(ctx, seconds(asked.DeadlineS))
		defer cancel()
		ctx = limited
	}
	switch asked.Do {
	case "connect":
		return a.connect(asked)
	case "close":
		return a.close()
	case "create":
		return a.create(ctx, asked)
	case "get":
		return a.get(ctx, asked)
	case "list":
		return a.list(ctx, asked)
	case "update":
		return a.update(ctx, asked)
	case "delete":
		return a.delete(ctx, asked)
	case "stop":
		return a.stop(ctx, asked)
	case "wait":
		return a.wait(ctx, asked)
	case "cancel":
		_, err := a.client.Operations.CancelOperation(ctx, &longrunningpb.CancelOperationRequest{Name: asked.Operation})
		return empty{}, err
	case "upload":
		return a.upload(ctx, asked)
	}
	return a.stream(ctx, asked)
}

func (a *agent) context() context.Context {
	a.mutex.Lock()
	defer a.mutex.Unlock()
	return a.ctx
}

func (a *agent) connect(asked *request) (any, error) {
	a.mutex.Lock()
	defer a.mutex.Unlock()
	a.ctx, a.end = context.WithCancel(context.Background())
	a.watches, a.informers, a.consoles = map[string]*watched{}, map[string]*informed{}, map[string]*console{}
	client, err := virtfleet.Dial(a.ctx, virtfleet.WithAddress(asked.Address), virtfleet.WithCredentials(virtfleet.Credentials{
		CAFile: asked.CAFile, CertFile: asked.CertFile, KeyFile: asked.KeyFile,
	}))
	a.client = client
	return empty{}, err
}

func (a *agent) close() (any, error) {
	a.mutex.Lock()
	defer a.mutex.Unlock()
	a.end()
	for _, one := range a.watches {
		one.gate.release()
		<-one.done
	}
	for _, one := range a.informers {
		one.gate.release()
		<-one.done
	}
	for _, one := range a.consoles {
		<-one.done
	}
	a.watches, a.informers, a.consoles = nil, nil, nil
	if a.client == nil {
		return empty{}, nil
	}
	err := a.client.Close()
	a.client = nil
	return empty{}, err
}

func (a *agent) create(ctx context.Context, asked *request) (any, error) {
	driver, memory := "test", int64(64<<20)
	spec := &computev1.DomainSpec{Driver: &driver, Memory: &computev1.Memory{MaximumBytes: &memory}}
	if asked.PowerButtonDelayS > 0 {
		spec.DriverOptions = &computev1.DomainSpec_Test{
			Test: &computev1.TestOptions{PowerButtonDelay: durationpb.New(seconds(asked.PowerButtonDelayS))},
		}
	}
	wanted := &computev1.CreateDomainRequest{
		Parent: asked.Parent, DomainId: asked.DomainID, Domain: &computev1.Domain{Spec: spec},
	}
	if asked.Start {
		wanted.Start = &computev1.StartOptions{}
	}
	operation, err := a.client.Domains.CreateDomain(ctx, wanted)
	if err != nil {
		return nil, err
	}
	domain, err := operation.Wait(ctx)
	if err != nil {
		return nil, err
	}
	return map[string]string{"name": domain.GetName(), "uid": domain.GetUid()}, nil
}

func stateOf(domain *computev1.Domain) string {
	return strings.TrimPrefix(domain.GetStatus().GetState().String(), "DOMAIN_STATE_")
}

func (a *agent) get(ctx context.Context, asked *request) (any, error) {
	domain, err := a.client.Domains.GetDomain(ctx, &computev1.GetDomainRequest{Name: asked.Name})
	if err != nil {
		return nil, err
	}
	return map[string]string{
		"name": domain.GetName(), "uid": domain.GetUid(), "etag": domain.GetEtag(), "state": stateOf(domain),
		"display_name": domain.GetDisplayName(),
	}, nil
}

func (a *agent) list(ctx context.Context, asked *request) (any, error) {
	names, count, missing := map[string]bool{}, 0, []string{}
	wanted := &computev1.ListDomainsRequest{
		Parent: asked.Parent, PageSize: asked.PageSize, View: typev1.ResourceView_RESOURCE_VIEW_BASIC,
	}
	for domain, err := range a.client.Domains.AllDomains(ctx, wanted) {
		var partial *virtfleet.PartialError
		if errors.As(err, &partial) {
			for _, failure := range partial.Failures {
				missing = append(missing, failure.GetNode())
			}
			break
		}
		if err != nil {
			return nil, err
		}
		count++
		names[domain.GetName()] = true
	}
	return map[string]any{"count": count, "distinct_count": len(names), "missing": missing}, nil
}

func (a *agent) update(ctx context.Context, asked *request) (any, error) {
	operation, err := a.client.Domains.UpdateDomain(ctx, &computev1.UpdateDomainRequest{
		Domain:     &computev1.Domain{Name: asked.Name, DisplayName: asked.DisplayName, Etag: asked.Etag},
		UpdateMask: &fieldmaskpb.FieldMask{Paths: []string{"display_name"}},
	})
	if err != nil {
		return nil, err
	}
	domain, err := operation.Wait(ctx)
	if err != nil {
		return nil, err
	}
	return map[string]string{"etag": domain.GetEtag()}, nil
}

func (a *agent) delete(ctx context.Context, asked *request) (any, error) {
	operation, err := a.client.Domains.DeleteDomain(ctx, &computev1.DeleteDomainRequest{Name: asked.Name, Stop: true})
	if err != nil {
		return nil, err
	}
	_, err = operation.Wait(ctx)
	return empty{}, err
}

func (a *agent) stop(ctx context.Context, asked *request) (any, error) {
	grace := asked.TimeoutS
	if grace == 0 {
		grace = 30
	}
	operation, err := a.client.Domains.StopDomain(ctx, &computev1.StopDomainRequest{
		Name: asked.Name, Mode: computev1.StopMode_STOP_MODE_GRACEFUL, GracePeriod: durationpb.New(seconds(grace)),
		InlineWait: durationpb.New(0),
	})
	if err != nil {
		return nil, err
	}
	return map[string]string{"operation": operation.Name()}, nil
}

func (a *agent) wait(ctx context.Context, asked *request) (any, error) {
	domain, err := virtfleet.OperationNamed[*computev1.Domain](a.client, asked.Operation).Wait(ctx)
	if err != nil {
		return nil, err
	}
	return map[string]string{"state": stateOf(domain)}, nil
}

func content(seed uint32, size int64) []byte {
	data := make([]byte, 0, size)
	for word := range uint32(size / 4) {
		data = binary.LittleEndian.AppendUint32(data, seed+word)
	}
	return data
}

func (a *agent) upload(ctx context.Context, asked *request) (any, error) {
	data := content(asked.Seed, asked.SizeBytes)
	digest := sha256.Sum256(data)
	stream, err := a.client.Volumes.UploadVolume(ctx)
	if err != nil {
		return nil, err
	}
	start := &storagev1.UploadStart{
		LengthBytes: int64(len(data)), Digest: "sha256:" + hex.EncodeToString(digest[:]), UploadId: asked.UploadID,
	}
	err = stream.Send(&storagev1.UploadVolumeRequest{
		Name: asked.Name, Content: &storagev1.UploadVolumeRequest_Start{Start: start},
	})
	for offset := asked.OffsetBytes; err == nil && offset < int64(len(data)); offset += chunkBytes {
		piece := data[offset:min(offset+chunkBytes, int64(len(data)))]
		chunk := &typev1.DataChunk{Offset: offset, Content: &typev1.DataChunk_Data{Data: piece}}
		err = stream.Send(&storagev1.UploadVolumeRequest{Content: &storagev1.UploadVolumeRequest_Chunk{Chunk: chunk}})
	}
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	// After io.EOF of a Send the cause is here.
	told, err := stream.CloseAndRecv()
	if err != nil {
		return nil, err
	}
	return map[string]int64{"content_length": told.GetVolume().GetSpec().GetCapacityBytes()}, nil
}

func unknown(asked *request) error { return fmt.Errorf("%w: %q", errUnknownStep, asked.Do) }
