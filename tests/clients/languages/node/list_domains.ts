// Lists the domains of a fleet; `stubs` is what `make stubs LANGUAGE=node` has made.
import { readFileSync } from "node:fs";
import { promisify } from "node:util";
import { credentials } from "@grpc/grpc-js";
import { domainStateToJSON, DomainServiceClient, ListDomainsRequest, type ListDomainsResponse } from "./stubs/virtfleet/compute/v1/domain.js";

const setting = (name: string): string => process.env[`VIRTFLEET_${name}`] ?? "";
const [ca, key, cert] = ["CA", "KEY", "CERT"].map((name) => readFileSync(setting(`${name}_FILE`)));
const domains = new DomainServiceClient(setting("ADDRESS"), credentials.createSsl(ca, key, cert));
const list = promisify<ListDomainsRequest, ListDomainsResponse>(domains.listDomains.bind(domains));

try {
  let pageToken = "";
  do {
    const page = await list(ListDomainsRequest.fromPartial({ parent: "nodes/-", pageSize: 2, pageToken }));
    for (const domain of page.domains) console.log(domain.name, domainStateToJSON(domain.status!.state));
    pageToken = page.nextPageToken;
  } while (pageToken);
} catch (error) {
  console.error(`${error}`);
  process.exitCode = 1;
} finally {
  domains.close();
}
